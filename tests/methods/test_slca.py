"""SLCA in a trainer: a slow backbone, one head a task, alignment."""

import copy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mh_lightning import MHLinear
from mh_lightning.backbones import Backbone, Identity
from mh_lightning.callbacks import ContinualMetrics, TaskCheckpoints
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.heads import TruncatedNormalLinear
from mh_lightning.methods import SLCA, ClassifierAlignment
from tests import fits
from tests.blobs import FEATURES, blobs

HIDDEN = 6
memory_head = partial(
    MHLinear, key_mem_units=5, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_alpha=0.999, tau_mu=20,
    tau_eta=5, beta_k=0.05,
)  # fmt: skip
HEADS = {"linear": TruncatedNormalLinear, "memory_head": memory_head}
every_head = pytest.mark.parametrize("head", HEADS)


class Tuned(Backbone):
    """A layer that learns."""

    num_features = HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def method(head: str = "linear", alignment: ClassifierAlignment | None = None, frozen: bool = False) -> SLCA:
    torch.manual_seed(0)
    backbone = Identity(FEATURES) if frozen else Tuned()
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1])
    return SLCA(backbone, HEADS[head], optimizer, scheduler, alignment)  # type: ignore[arg-type]


def alignment(**options: Any) -> ClassifierAlignment:
    return ClassifierAlignment(**{"epochs": 2, "samples_per_class": 24, "batch_size": 30, **options})


stream = partial(fits.stream, epochs_per_task=2)


def fit(model: SLCA, folder: Path, data: Tensors | None = None, resume: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    return fits.fit(model, folder, data or stream(), resume, **options)


def state_of(model: SLCA) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def accuracy_matrix(trainer: Trainer) -> Tensor:
    metrics = next(one for one in trainer.callbacks if isinstance(one, ContinualMetrics))  # type: ignore[attr-defined]
    matrix: Tensor = metrics._metrics["test"].compute()["accuracy_matrix"]
    return matrix


class Watch(Callback):
    """Keeps the heads' state after each task."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.task_heads.state_dict()))


@every_head
def test_heads_of_former_tasks_are_frozen_for_good(head: str, tmp_path: Path) -> None:
    watch, model = Watch(), method(head)
    fit(model, tmp_path, callbacks=[watch])
    for task in (0, 1):
        for name, value in watch.states[task].items():
            if name.startswith(f"heads.{task}."):
                assert torch.equal(watch.states[-1][name], value), name
        later = f"heads.{task + 1}."
        assert any(not torch.equal(watch.states[task][name], value)
                   for name, value in watch.states[task + 1].items() if name.startswith(later))  # fmt: skip
    if head == "memory_head":
        assert all(int(one.scrambling_count) > 0 for one in model.memory_heads().values())


@every_head
def test_training_is_the_same_with_and_without_alignment(head: str, tmp_path: Path) -> None:
    """Training goes on from the heads before alignment, and nothing that alignment draws shifts what else is drawn."""
    plain, aligned = method(head), method(head, alignment())
    trainers = [fit(model, tmp_path / str(number)) for number, model in enumerate((plain, aligned))]
    state = state_of(aligned)
    for name, value in state_of(plain).items():
        assert torch.equal(state[name], value), name
    matrices = [accuracy_matrix(trainer) for trainer in trainers]
    assert torch.equal(matrices[0][0], matrices[1][0])  # the first task has nothing to align
    assert not torch.equal(matrices[0], matrices[1])
    assert aligned.class_gaussians is not None and bool((aligned.class_gaussians.counts > 0).all())
    # the aligned heads predict in a checkpoint, too
    model = method(head, alignment())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    last: Any = trainer.predict(model, stream(), ckpt_path=tmp_path / "1" / "checkpoints" / "last.ckpt")
    predicted = torch.cat(last).argmax(dim=1)
    assert (predicted == blobs(50, 2)[1]).double().mean() == pytest.approx(
        float(((matrices[1][-1]) * torch.bincount(_tasks_of(blobs(50, 2)[1]))).sum() / 50)
    )


def _tasks_of(targets: Tensor) -> Tensor:
    return (targets >= 3).long() + (targets >= 5).long()


def test_class_statistics_are_those_of_the_features_of_their_time(tmp_path: Path) -> None:
    class Keep(Callback):
        moments: dict[int, Tensor]

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            samples = data._splits["train"]
            with torch.no_grad():
                features = pl_module.backbone(samples.features)
            for label in data.class_groups[trainer.current_epoch // 2]:
                rows = features[torch.from_numpy(samples.labels == label)]
                torch.testing.assert_close(pl_module.class_gaussians.means[label], rows.double().mean(dim=0))
                expected = rows.double().T.cov() + 1e-4 * torch.eye(HIDDEN)
                torch.testing.assert_close(pl_module.class_gaussians.covariance_of(label), expected, rtol=1e-4,
                                           atol=1e-6)  # fmt: skip

    fit(method("linear", alignment()), tmp_path, callbacks=[Keep()])


@every_head
@pytest.mark.parametrize("checkpoint", ["task_1", "task_2"])
def test_a_resumed_fit_ends_as_if_it_had_not_been_stopped(head: str, checkpoint: str, tmp_path: Path) -> None:
    whole, resumed = method(head, alignment(freeze_keys=False)), method(head, alignment(freeze_keys=False))
    trainer = fit(whole, tmp_path / "whole")
    again = fit(resumed, tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoints" / f"{checkpoint}.ckpt")
    assert torch.equal(accuracy_matrix(trainer), accuracy_matrix(again))
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[name], value), name


class StopAfter(Callback):
    """Ends the run after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


@every_head
@pytest.mark.parametrize("epoch", [2, 4])  # the first of the second and of the third task
def test_a_fit_resumed_inside_a_task(head: str, epoch: int, tmp_path: Path) -> None:
    whole, stopped, resumed = method(head), method(head), method(head)
    fit(whole, tmp_path / "whole")
    fit(stopped, tmp_path / "stopped", callbacks=[TaskCheckpoints(), StopAfter(epoch)])
    fit(resumed, tmp_path / "resumed", resume=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[name], value), name


CASES: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear", "alignment": alignment(covariance="low_rank", rank=3)},
    "memory_head": {"head": "memory_head", "alignment": alignment(freeze_keys=False)},
    "frozen": {"head": "linear", "alignment": alignment(covariance="shared"), "frozen": True},
}


def work(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name, case in CASES.items():
        model = method(**case)
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        trainer = fit(model, folder / name, devices=fits.RANKS, strategy=strategy, enable_checkpointing=False,
                      callbacks=[NothingLargeIsBroadcast()], precision="64-true")  # fmt: skip
        states[name] = state_of(model) | {"matrix": accuracy_matrix(trainer)}
    return states


class NothingLargeIsBroadcast(Callback):
    """The statistics are on every rank already."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model: Any = trainer.strategy.model
        assert isinstance(model, DistributedDataParallel)
        names = {id(buffer) for buffer in model.modules_buffers}
        assert not names & {id(buffer) for buffer in pl_module.class_gaussians.buffers()}


@pytest.fixture(scope="module")
def states_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank has learnt; one spawn for all cases."""
    return fits.on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(
    name: str, states_of_ranks: list[dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    alone = method(**CASES[name])
    trainer = fit(alone, tmp_path, callbacks=[], enable_checkpointing=False, precision="64-true")
    expected = state_of(alone) | {"matrix": accuracy_matrix(trainer)}
    first, second = (states[name] for states in states_of_ranks)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        if value.is_floating_point():
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(first[key], value), key


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    states = []
    for batch_size, steps in ((8, 1), (2, 4)):
        model = method("memory_head")
        fit(model, tmp_path / str(steps), stream(batch_size=batch_size), accumulate_grad_batches=steps,
            precision="64-true")  # fmt: skip
        states.append(state_of(model))
    for name, value in states[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(states[1][name], value)


def test_a_class_in_several_tasks_is_refused(tmp_path: Path) -> None:
    x, targets = torch.randn(8, FEATURES), torch.arange(8) % 2
    domains = torch.arange(8) // 4
    data = Tensors(x, targets, x, targets, domain_train=domains, domain_test=domains, scenario="CDI")
    with pytest.raises(UserError, match=r"data\.scenario=CDI: SLCA has a head for each task, .* use CI"):
        fit(method(frozen=True), tmp_path, data)


@pytest.mark.parametrize("options", [{"class_order": [6, 5, 4, 3, 2, 1, 0]}, {"first_task_size": 1}], ids=str)
def test_a_second_fit_with_classes_of_the_first_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = method()
    fit(model, tmp_path / "first")
    with pytest.raises(UserError, match=r"heads for tasks of classes \[\[0, 1, 2\].* must be of new classes"):
        fit(model, tmp_path / "second", stream(**options))


def test_parameters_of_the_aligned_copy_do_not_count(tmp_path: Path) -> None:
    model = method(alignment=alignment())
    fit(model, tmp_path)
    numbers = sum(one.numel() for one in [*model.backbone.parameters(), *model.task_heads.parameters()])
    assert model.parameter_counts() == {"total": numbers, "trainable": numbers}


def test_an_interrupted_alignment_does_not_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = method(alignment=alignment())

    def interrupted(*args: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(ClassifierAlignment, "_loss", interrupted)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model, tmp_path)
    assert model._predicting_heads() is model.task_heads
    assert all(parameter.requires_grad for parameter in model.task_heads.heads[2].parameters())


def test_a_run_is_resumed_with_its_own_alignment(tmp_path: Path) -> None:
    fit(method(alignment=alignment()), tmp_path / "whole")
    other = method(alignment=alignment(jitter=1.0))
    with pytest.raises(UserError, match=r"alignment\.jitter=0\.0001, the configuration says 1\.0"):
        fit(other, tmp_path / "other", resume=tmp_path / "whole" / "checkpoints" / "task_1.ckpt")


def test_a_head_without_parameters_is_refused(tmp_path: Path) -> None:
    model = SLCA(Identity(FEATURES), lambda features, classes: nn.Flatten())
    with pytest.raises(UserError, match=r"model\.init_args\.head: Flatten has nothing to train"):
        fit(model, tmp_path)
