"""The data module: splits, subsets, the order of training, checkpoints."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.data import StreamDataModule, Tensors
from tests.data.refusal import refused, refused_stream

COUNTS = (40, 20, 30, 10)  # training samples of each class


def stream(**options: object) -> Tensors:
    """Four unequal classes; each sample is its own number, test samples from 1000."""
    y_train = torch.tensor(COUNTS).cumsum(0)
    labels = torch.searchsorted(y_train, torch.arange(sum(COUNTS)), right=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(100.0).view(-1, 1)
    return Tensors(numbers, labels[order], numbers[:40] + 1000, labels[order][:40], **options)


def attach(
    module: StreamDataModule, epoch: int = 0, rank: int = 0, ranks: int = 1, backbone: Backbone | None = None
) -> StreamDataModule:
    """A stand-in for the trainer."""
    module.trainer = SimpleNamespace(
        current_epoch=epoch, global_rank=rank, world_size=ranks, lightning_module=SimpleNamespace(backbone=backbone)
    )
    return module


def ready(**options: object) -> Tensors:
    module = stream(**options)
    module.setup("fit")
    return module


def samples(loader) -> list[int]:
    return [int(number) for x, _, _ in loader for number in x.flatten()]


def drawn(module: Tensors, split: str) -> tuple[list[int], Tensor]:
    """The numbers of a split's samples, and how many there are of each class."""
    labelled = module._splits[split]
    return labelled.inputs.flatten().int().tolist(), torch.bincount(torch.from_numpy(labelled.labels), minlength=4)


def test_tasks() -> None:
    module = ready(increment=1, first_task_size=2, class_order=[3, 1, 0, 2], epochs_per_task=2)
    assert module.class_groups == [[3, 1], [0], [2]]
    assert [module.num_samples("train", task) for task in range(3)] == [30, 40, 30]
    assert [module.task_of_epoch(epoch) for epoch in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    for epoch, classes, task in ((0, {3, 1}, 0), (1, {3, 1}, 0), (3, {0}, 1), (4, {2}, 2)):
        batches = list(attach(module, epoch).train_dataloader())
        assert {int(label) for _, labels, _ in batches for label in labels} == classes
        assert {int(number) for _, _, tasks in batches for number in tasks} == {task}
    (x, targets, tasks), *rest = module.test_dataloader()[0]
    assert x.flatten().tolist() == list(range(1000, 1040)) and not rest
    assert tasks.tolist() == [{3: 0, 1: 0, 0: 1, 2: 2}[label] for label in targets.tolist()]


def test_validation_is_held_out_of_each_class_alike() -> None:
    module = ready(validation_fraction=0.2)
    assert module.evaluation_splits == ["test", "validation"] and len(module.val_dataloader()) == 2
    train, in_train = drawn(module, "train")
    validation, in_validation = drawn(module, "validation")
    assert in_validation.tolist() == [8, 4, 6, 2] and in_train.tolist() == [32, 16, 24, 8]
    assert sorted(train + validation) == list(range(100))
    test, validated = module.val_dataloader()
    assert samples(test) == list(range(1000, 1040)) and samples(validated) == validation
    assert set(samples(attach(module).train_dataloader())).isdisjoint(validation)
    assert len(module.test_dataloader()) == len(module.predict_dataloader()) == 1
    assert drawn(ready(validation_fraction=0.2), "validation")[0] == validation
    assert drawn(ready(validation_fraction=0.2, split_seed=1), "validation")[0] != validation
    assert len(ready().val_dataloader()) == 1


def test_subsets() -> None:
    module = ready(max_train_samples=50, max_test_samples=20)
    train, in_train = drawn(module, "train")
    test, in_test = drawn(module, "test")
    assert in_train.tolist() == [20, 10, 15, 5] and len(set(train)) == 50
    assert sum(in_test) == 20 and len(set(test)) == 20 and min(test) >= 1000 and min(in_test) >= 1
    assert train == sorted(train) and test == sorted(test)
    assert drawn(ready(max_train_samples=50, split_seed=1), "train")[0] != train
    for size in (100, 101):
        assert len(drawn(ready(max_train_samples=size), "train")[0]) == 100
    both = ready(max_train_samples=50, validation_fraction=0.2)
    assert len(drawn(both, "train")[0]) == 40 and len(drawn(both, "validation")[0]) == 10


def test_subset_of_nearly_all() -> None:
    assert len(set(drawn(ready(max_train_samples=96), "train")[0])) == 96
    refused(lambda: ready(max_train_samples=98), "data.max_train_samples=98", "100 samples", "each class")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"epochs_per_task": 0}, "data.epochs_per_task"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"eval_batch_size": -1}, "data.eval_batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"validation_fraction": 1.0}, "data.validation_fraction"),
        ({"validation_fraction": -0.1}, "data.validation_fraction"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction"),
        ({"validation_fraction": 0.01}, "data.validation_fraction=0.01"),
        ({"validation_fraction": 0.99}, "data.validation_fraction=0.99"),
        ({"max_train_samples": 3}, "data.max_train_samples=3"),
        ({"max_train_samples": 0}, "data.max_train_samples must be at least 1, got 0"),
        ({"max_train_samples": -5}, "data.max_train_samples must be at least 1, got -5"),
        ({"max_test_samples": 1}, "data.max_test_samples=1"),
        ({"split_seed": -1, "validation_fraction": 0.2}, "data.split_seed"),
        ({"increment": 3}, "data.increment=3"),
        ({"scenario": "DI"}, "data.scenario=DI needs domains"),
        ({"scenario": "CDI"}, "data.scenario=CDI needs domains"),
        ({"scenario": "CDID"}, "data.scenario=CDID needs domains"),
        ({"scenario": "ID"}, "data.scenario must be one of IID"),
        ({"chunk_size": 48, "batch_size": 32}, "data.chunk_size=48 must be a multiple of data.batch_size=32"),
        ({"chunk_size": 0}, "data.chunk_size=0"),
        ({"validation_fraction": 0.2, "split_fractions": [0.7, 0.1, 0.2]}, "exclude each other"),
        ({"split_fractions": [0.7, 0.2]}, "data.split_fractions"),
        ({"split_fractions": [0.98, 0.01, 0.01]}, "no test sample of class"),
        ({"validation_tasks": "first_half"}, "data.validation_tasks=first_half needs validation samples"),
        ({"class_order": [0, 1]}, "data.class_order"),
    ],
)
def test_refused_options(options: dict, part: str) -> None:
    refused(lambda: next(iter(ready(**options).train_dataloader())), part)


def test_every_task_needs_samples() -> None:
    x, y = torch.randn(8, 2), torch.arange(8) % 4
    refused_stream(Tensors(x, y, x[:6], y[:6].clamp_max(2)), "no test sample", "class 3")


def with_domains(**options: object) -> Tensors:
    """Four classes in each of three domains: ten training samples, two validation samples, four test samples."""
    labels, domains = torch.arange(4).repeat(30), torch.arange(3).repeat_interleave(4).repeat(10)
    numbers = torch.randperm(120, generator=torch.Generator().manual_seed(0)).float().view(-1, 1)
    given: dict[str, Tensor] = {"x_train": numbers, "y_train": labels, "domain_train": domains}
    for split, samples, start in (("validation", 24, 1000), ("test", 48, 2000)):
        x = torch.arange(start, start + samples).float().view(-1, 1)
        given |= {f"x_{split}": x, f"y_{split}": labels[:samples], f"domain_{split}": domains[:samples]}
    module = Tensors(**given | options)
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("scenario", "train", "validated"),
    [("IID", [120], 1), ("CI", [60] * 2, 1), ("DI", [40] * 3, 1), ("CDI", [20] * 6, 3), ("CDID", [20] * 6, 3)],
)
def test_scenarios(scenario: str, train: list[int], validated: int) -> None:
    module = with_domains(scenario=scenario, increment=2, validation_tasks="first_half")
    tasks = range(module.num_tasks)
    assert [module.num_samples("train", task) for task in tasks] == train
    assert [module.num_samples("test", task) for task in tasks] == [48 // len(train)] * len(train)
    counts = [module.num_samples("validation", task) for task in tasks]
    assert counts == [24 // len(train) if len(train) > 1 else 12] * validated + [0] * (len(train) - validated)
    assert module.num_evaluated_tasks("validation") == validated and module.num_evaluated_tasks("test") == len(train)
    seen = [samples(attach(module, epoch=task).train_dataloader()) for task in tasks]
    assert sorted(number for task in seen for number in task) == list(range(120))
    assert all((task == sorted(task)) == (scenario == "CDID") for task in seen)
    for loader, first, last in zip(module.val_dataloader(), (2000, 1000), (2048, 1024), strict=True):
        batches = list(loader)
        shown = [(int(label), int(task)) for _, labels, of in batches for label, task in zip(labels, of, strict=True)]
        numbers = samples(batches)
        if scenario != "IID":
            assert numbers == [number for number in range(first, last) if number in numbers]
        by_domain, by_class = scenario in ("DI", "CDI", "CDID"), scenario in ("CI", "CDI", "CDID")
        for number, (label, task) in zip(numbers, shown, strict=True):
            domain = (number - first) // 4 % 3 if by_domain else 0
            group = (number - first) % 4 // 2 if by_class else 0
            assert label == (number - first) % 4 and task == domain * (2 if by_class else 1) + group


def test_chunks_hold_whole_batches_in_the_same_order() -> None:
    for options in ({}, {"scenario": "CDID"}):
        alone, chunked = (with_domains(increment=4, batch_size=3, chunk_size=size, **options) for size in (None, 9))
        batches = [x for x, _, _ in attach(alone).train_dataloader()]
        chunks = [x for x, _, _ in attach(chunked).train_dataloader()]
        assert [len(chunk) for chunk in chunks[:-1]] == [9] * (len(chunks) - 1) and len(chunks) > 1
        split = [batch for chunk in chunks for batch in chunk.split(3)]
        assert all(torch.equal(batch, part) for batch, part in zip(batches, split, strict=True))
    refused(attach(chunked, ranks=3).train_dataloader, "data.chunk_size", "3")


def test_published_split() -> None:
    module = ready(split_fractions=[0.7, 0.1, 0.2])
    whole = torch.tensor(COUNTS) + torch.bincount(torch.from_numpy(stream().load().test.labels))
    found = {split: drawn(module, split) for split in ("train", "validation", "test")}
    assert sorted(number for numbers, _ in found.values() for number in numbers) == [*range(100), *range(1000, 1040)]
    for split, fraction in zip(found, (0.7, 0.1, 0.2), strict=True):
        assert (found[split][1] - whole * fraction).abs().max() <= 1
    for label in range(4):  # the data's order
        train, validation, test = (np.array(found[split][0])[module._splits[split].labels == label] for split in found)
        assert train.max() < validation.min() and validation.max() < test.min()
    small = ready(split_fractions=[0.7, 0.1, 0.2], max_train_samples=20, max_test_samples=10)
    assert len(drawn(small, "train")[0]) == 20 and set(drawn(small, "train")[0]) < set(found["train"][0])
    assert len(drawn(small, "test")[0]) == 10 and drawn(small, "validation")[0] == found["validation"][0]


def test_each_domain_needs_samples_of_each_class() -> None:
    domains = torch.arange(3).repeat_interleave(4).repeat(4)
    refused(lambda: with_domains(scenario="CDI", domain_test=domains.clamp_max(1)), "no test sample", "0 in domain 3")
    refused(lambda: with_domains(scenario="CDI", domain_test=domains + 1), "test domains", "0 to 2", "got 3")
    with_domains(scenario="CI", domain_test=domains.clamp_max(1))


def test_images_do_not_drift() -> None:
    images, labels = torch.zeros(8, 2, 2, dtype=torch.uint8), torch.arange(8) % 2
    domains = {"domain_train": labels // 2, "domain_test": labels // 2}
    refused_stream(Tensors(images, labels, images, labels, scenario="CDID", **domains), "data.scenario=CDID", "use CDI")


def epoch_order(seed: str | None, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    if seed is None:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    else:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    return samples(attach(ready(increment=4, epochs_per_task=5), epoch).train_dataloader())


def test_order_depends_on_the_seed_and_the_epoch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("4294967295", 0)]
    orders = [epoch_order(*case, monkeypatch) for case in cases]
    assert len({tuple(order) for order in orders}) == len(cases)
    assert all(sorted(order) == list(range(100)) for order in orders)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert [epoch_order(*case, monkeypatch) for case in cases] == orders
    assert epoch_order(None, 3, monkeypatch) == epoch_order(None, 3, monkeypatch)


def test_ranks_share_each_batch() -> None:
    module = ready(increment=4, batch_size=8)
    alone = [x.flatten().tolist() for x, _, _ in attach(module).train_dataloader()]
    ranks = [[x.flatten().tolist() for x, _, _ in attach(module, 0, rank, 2).train_dataloader()] for rank in (0, 1)]
    assert [sorted(first + second) for first, second in zip(*ranks, strict=True)] == [sorted(b) for b in alone]
    tested = [samples(attach(module, 0, rank, 2).test_dataloader()[0]) for rank in (0, 1)]
    assert sorted(tested[0] + tested[1]) == list(range(1000, 1040))


def test_a_rank_without_a_sample_gets_an_empty_batch() -> None:
    images, labels = torch.zeros(10, 4, 6, dtype=torch.uint8), torch.arange(10) % 2
    module = Tensors(images, labels, images, labels, batch_size=4, increment=2)
    module.setup("fit")
    batches = list(attach(module, rank=2, ranks=3, backbone=Recorder()).train_dataloader())
    assert [len(targets) for _, targets, _ in batches] == [1, 1, 0]
    assert batches[2][0].shape == (0, *batches[0][0].shape[1:])
    assert [part.dtype for part in batches[2]] == [part.dtype for part in batches[0]]


class Recorder(Backbone):
    """Notes which transform was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def transform(self, augment: bool):
        self.asked.append(augment)
        return lambda image: torch.full((1,), float(augment))


@pytest.mark.parametrize("augment", [False, True])
def test_only_training_is_augmented(augment: bool) -> None:
    images, labels = torch.zeros(8, 2, 2, dtype=torch.uint8), torch.arange(8) % 2
    module = Tensors(images, labels, images, labels, augment=augment, validation_fraction=0.5)
    module.setup("fit")
    backbone = Recorder()
    attach(module, backbone=backbone)
    assert next(iter(module.train_dataloader()))[0].unique().tolist() == [float(augment)]
    for loader in (*module.val_dataloader(), *module.test_dataloader(), *module.predict_dataloader()):
        assert next(iter(loader))[0].unique().tolist() == [0.0]
    assert backbone.asked == [augment, False, False, False, False]


def test_checkpoint_of_another_stream() -> None:
    saved = ready(increment=2, epochs_per_task=3).state_dict()
    ready(increment=2, epochs_per_task=3).load_state_dict(saved)
    parts = ("ckpt_path", "class_groups", "[[0, 1], [2, 3]]", "[[0], [1], [2], [3]]")
    refused(lambda: ready(epochs_per_task=3).load_state_dict(saved), *parts)
    order = {"class_order": [1, 0, 2, 3]}
    refused(lambda: ready(increment=2, epochs_per_task=3, **order).load_state_dict(saved), "ckpt_path", "class_groups")
    refused(lambda: ready(increment=2).load_state_dict(saved), "ckpt_path", "epochs_per_task 3 instead of 1")


def test_setup_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready()
    monkeypatch.setattr(module, "load", None)
    for stage in ("validate", "test", "predict"):
        module.setup(stage)
