"""A trained model that learns more tasks."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import nn

import mh_lightning
from mh_lightning.backbones import Identity, TimmBackbone
from mh_lightning.callbacks import EarlierTasks, TaskCheckpoints
from mh_lightning.cli import main
from mh_lightning.data import Tensors
from mh_lightning.data.transforms import IMAGENET
from mh_lightning.errors import UserError
from mh_lightning.growth import grown
from mh_lightning.methods import (
    EWC,
    SLCA,
    AveragedGEM,
    ClassifierAlignment,
    ClosedForm,
    DERPlusPlus,
    Ensemble,
    ExperienceReplay,
    FineTuning,
    GDumb,
    ICaRL,
    JointTraining,
    LwF,
    MaximallyInterferedRetrieval,
    SynapticIntelligence,
    WeightAligning,
)
from mh_lightning.methods.base import ContinualMethod
from tests.blobs import FEATURES, blobs
from tests.fits import fit
from tests.inference.test_export import HEADS, MEMORY_HEAD

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def part(labels: list[int], increment: int | list[int] = 2, seed: int = 1) -> Tensors:
    """A stream of some of the classes, which are numbered anew."""
    (x, y), (x_test, y_test) = blobs(150, seed), blobs(60, 2)
    number = {label: place for place, label in enumerate(labels)}

    def of(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.isin(targets, torch.tensor(labels))
        return inputs[rows], torch.tensor([number[int(label)] for label in targets[rows]])

    named = [NAMES[label] for label in labels]
    return Tensors(*of(x, y), *of(x_test, y_test), increment=increment, batch_size=8, class_names=named)


def learnt(method: ContinualMethod, folder: Path, data: Tensors) -> ContinualMethod:
    seed_everything(0)
    fit(method, folder, data)
    return method


@pytest.mark.parametrize("name", HEADS)
def test_closed_forms_end_where_one_run_does(name: str, tmp_path: Path) -> None:
    make: Callable[[], ContinualMethod] = lambda: ClosedForm(Identity(FEATURES), HEADS[name])  # noqa: E731
    seed_everything(0)
    learnt(make(), tmp_path / "first", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "first")
    learnt(model.method, tmp_path / "second", part([4, 5, 6], increment=[1, 2]))
    seed_everything(0)
    whole = learnt(make(), tmp_path / "whole", part([0, 1, 2, 3, 4, 5, 6], increment=[2, 2, 1, 2]))
    queries, _ = blobs(50, 4)
    both = [mh_lightning.load(tmp_path / run).predict(queries) for run in ("second", "whole")]
    assert both[0].labels == both[1].labels
    np.testing.assert_array_equal(both[0].probabilities, both[1].probabilities)
    assert mh_lightning.load(tmp_path / "second").class_names == NAMES
    state, other = model.method.state_dict(), whole.state_dict()
    assert all(torch.equal(value, other[entry]) for entry, value in state.items())
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    first = json.loads((tmp_path / "first" / "results.json").read_text())
    rows = json.loads((tmp_path / "whole" / "results.json").read_text())["accuracy_matrix"]
    matrix = results["parent"]["accuracy_matrix_of_both"]
    assert [row[:2] for row in matrix[:2]] == first["accuracy_matrix"]
    assert [row[2:] for row in matrix[:2]] == [[None, None]] * 2 and [row[:2] for row in matrix[2:]] == [
        [None, None]
    ] * 2
    assert [row[2:] for row in matrix[2:]] == [row[2:] for row in rows[2:]]
    assert results["parent"]["from"].endswith("first/checkpoints/last.ckpt")


METHODS: dict[str, Callable[[], ContinualMethod]] = {
    "memory head": lambda: FineTuning(Identity(FEATURES), MEMORY_HEAD),
    "linear": lambda: FineTuning(Identity(FEATURES), nn.Linear, partial(torch.optim.SGD, lr=0.3)),
    "ensemble": lambda: Ensemble(Identity(FEATURES), nn.Linear, members=2, optimizer=partial(torch.optim.SGD, lr=0.3)),
}


def test_earlier_tasks_are_measured_where_their_test_data_are_given(tmp_path: Path) -> None:
    """The matrix of a run that goes on is that of one uninterrupted run."""
    make = lambda: ClosedForm(Identity(FEATURES), HEADS["kernel"])  # noqa: E731
    learnt(make(), tmp_path / "first", part([0, 1, 2, 3]))
    learnt(make(), tmp_path / "whole", part([0, 1, 2, 3, 4, 5, 6], increment=[2, 2, 1, 2]))
    rows = json.loads((tmp_path / "whole" / "results.json").read_text())["accuracy_matrix"]

    def go_on(folder: str, *streams: Tensors, resume: Path | None = None) -> list[list[float]]:
        method = mh_lightning.load(tmp_path / "first").method
        seed_everything(0)
        callbacks = [EarlierTasks(streams), TaskCheckpoints()]
        fit(method, tmp_path / folder, part([4, 5, 6], increment=[1, 2]), resume, callbacks=callbacks)
        found = json.loads((tmp_path / folder / "results.json").read_text())["parent"]["accuracy_matrix_of_both"]
        assert [row[:2] for row in found[:2]] == [row[:2] for row in rows[:2]]
        return found[2:]  # type: ignore[no-any-return]

    assert go_on("second", part([0, 1, 2, 3])) == rows[2:]
    assert go_on("split", part([0, 1]), part([2, 3])) == rows[2:]
    resume = tmp_path / "second" / "checkpoints" / "task_1.ckpt"
    assert go_on("resumed", part([0, 1, 2, 3]), resume=resume) == rows[2:]
    for streams, message in (
        ((part([0, 1]),), r"learnt tasks of classes \[\[0, 1\], \[2, 3\]\], and streams have \[\[0, 1\]\]"),
        ((part([2, 3]), part([0, 1])), r"and streams have \[\[2, 3\], \[0, 1\]\]"),
        ((part([0, 1]), part([2, 4])), "has not learnt the class 'eel'"),
    ):
        with pytest.raises(UserError, match=message):
            go_on("refused", *streams)
    with pytest.raises(UserError, match="this fit goes on with no earlier one"):
        fit(make(), tmp_path / "alone", part([4, 5]), callbacks=[EarlierTasks([part([0, 1])])])


@pytest.mark.parametrize("name", METHODS)
def test_heads_of_layers_grow_and_learn(name: str, tmp_path: Path) -> None:
    learnt(METHODS[name](), tmp_path / "first", part([0, 1, 2, 3]))
    before = mh_lightning.load(tmp_path / "first")
    model = mh_lightning.load(tmp_path / "first")
    learnt(model.method, tmp_path / "second", part([2, 5, 4], increment=1))  # one that it knows, too
    after = mh_lightning.load(tmp_path / "second")
    assert after.class_names == ["ant", "bee", "cat", "dog", "fox", "eel"]
    queries, _ = blobs(50, 4)
    assert before.predict(queries).probabilities.shape == (50, 4)
    assert after.predict(queries).probabilities.shape == (50, 6) and "eel" in after.predict(queries).labels
    learnt(after.method, tmp_path / "third", part([6, 0], increment=2))  # and so on
    third = json.loads((tmp_path / "third" / "results.json").read_text())
    assert (
        len(third["parent"]["accuracy_matrix_of_both"])
        == 2 + 3 + 1
        == len(third["parent"]["accuracy_matrix_of_both"][0])
    )
    assert mh_lightning.load(tmp_path / "third").class_names[-1] == "gnu"


@pytest.mark.parametrize(
    "make", [METHODS["linear"], METHODS["memory head"], lambda: ClosedForm(Identity(FEATURES), HEADS["kernel"])]
)
def test_a_new_domain_is_one_run(make: Callable[[], ContinualMethod], tmp_path: Path) -> None:
    (x, y), (z, u), (q, v) = blobs(90, 1), blobs(80, 3, offset=0.5), blobs(40, 2)
    zeros = torch.zeros(len(q), dtype=torch.long)
    options = {"increment": 7, "batch_size": 8, "epochs_per_task": 2}
    learnt(make(), tmp_path / "first", Tensors(x, y, q, v, **options))
    model = mh_lightning.load(tmp_path / "first")
    learnt(model.method, tmp_path / "second", Tensors(z, u, q, v, **options))
    domains = torch.cat([torch.zeros(len(x)), torch.ones(len(z))]).long()
    both = Tensors(torch.cat([x, z]), torch.cat([y, u]), torch.cat([q, q]), torch.cat([v, v]), scenario="DI",
                   domain_train=domains, domain_test=torch.cat([zeros, zeros + 1]), **options)  # fmt: skip
    whole = learnt(make(), tmp_path / "whole", both)
    state, other = model.method.state_dict(), whole.state_dict()
    assert all(torch.equal(value, other[entry]) for entry, value in state.items())


ALIGNED = ClassifierAlignment(epochs=2, samples_per_class=40, learning_rate=0.05)


class HeadsInTrainingPredict(Callback):
    """Also in a fit that finds aligned heads of another."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert pl_module._predicting_heads() is pl_module.task_heads


@pytest.mark.parametrize("alignment", [None, ALIGNED])
def test_slca_goes_on_with_new_heads(alignment: ClassifierAlignment | None, tmp_path: Path) -> None:
    make = partial(SLCA, Identity(FEATURES), optimizer=partial(torch.optim.SGD, lr=0.3), alignment=alignment)
    first = learnt(make(), tmp_path / "first", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "first")
    seed_everything(0)
    fit(
        model.method,
        tmp_path / "second",
        part([4, 5, 6], increment=[1, 2]),
        callbacks=[HeadsInTrainingPredict(), TaskCheckpoints()],
    )
    heads = model.method.task_heads
    assert heads.class_groups == [[0, 1], [2, 3], [4], [5, 6]] and int(heads.tasks_begun) == 4
    for old, kept in zip(first.task_heads.heads, heads.heads, strict=False):
        assert torch.equal(old.weight, kept.weight)  # as they were trained, alignment is of a copy
    after = mh_lightning.load(tmp_path / "second")
    assert after.class_names == NAMES and after.method.task_heads.class_groups == heads.class_groups
    queries, targets = blobs(90, 4)
    labels, probabilities = after.predict(queries)
    np.testing.assert_array_equal(probabilities, model.predict(queries).probabilities)
    assert np.mean([label == NAMES[target] for label, target in zip(labels, targets, strict=True)]) > 0.45
    if alignment is not None:
        gaussians = model.method.class_gaussians
        whole = learnt(make(), tmp_path / "whole", part([*range(7)], [2, 2, 3]))
        for name in ("counts", "means", "factors"):
            torch.testing.assert_close(getattr(gaussians, name), getattr(whole.class_gaussians, name))
        assert not torch.equal(model.method.aligned_heads.heads[0].weight, heads.heads[0].weight)
    for labels in ([4, 5], [2, 3]):
        with pytest.raises(UserError, match=r"SLCA.* task"):
            fit(mh_lightning.load(tmp_path / "second").method, tmp_path / "x", part(labels, increment=1))


REPLAYED: dict[str, Callable[[], ContinualMethod]] = {
    "er": lambda: ExperienceReplay(Identity(FEATURES), FixedLinear, buffer_size=21, replay_batch_size=8),
    "a-gem": lambda: AveragedGEM(Identity(FEATURES), FixedLinear, buffer_size=21, replay_batch_size=8),
    "mir": lambda: MaximallyInterferedRetrieval(Identity(FEATURES), FixedLinear, buffer_size=21, candidates=15),
    "gdumb": lambda: GDumb(Identity(FEATURES), FixedLinear, buffer_size=21, epochs=2),
    "der++": lambda: DERPlusPlus(Identity(FEATURES), FixedLinear, buffer_size=21),
    "weight aligning": lambda: WeightAligning(Identity(FEATURES), FixedLinear, buffer_size=21),
}
REMEMBERING: dict[str, Callable[[], ContinualMethod]] = {
    "ewc": lambda: EWC(Identity(FEATURES), FixedLinear, penalty=1.0),
    "synaptic intelligence": lambda: SynapticIntelligence(Identity(FEATURES), FixedLinear),
    "lwf": lambda: LwF(Identity(FEATURES), FixedLinear),
    "icarl": lambda: ICaRL(Identity(FEATURES), FixedLinear, buffer_size=21),
}


class FixedLinear(nn.Linear):
    """Room for all classes that may come, so that a run which goes on has the same random numbers as one run."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.weight.copy_(torch.randn(7, num_features, generator=generator)[:num_classes])
            self.bias.zero_()


@grown.register
def _(head: FixedLinear, num_classes: int) -> FixedLinear:
    more = FixedLinear(head.in_features, num_classes)
    with torch.no_grad():
        for name, parameter in more.named_parameters():
            parameter[: head.out_features] = getattr(head, name)
    return more


@pytest.mark.parametrize("name", REPLAYED)
def test_replay_goes_on_with_what_it_kept(name: str, tmp_path: Path) -> None:
    """One pass over two streams is one pass over both, if new outputs do not move before their classes come."""
    state, other = states_of_two_passes_and_of_one(REPLAYED[name], tmp_path)
    assert torch.equal(state.pop("replay_buffer.tasks"), other.pop("replay_buffer.tasks") - 1)
    assert all(torch.equal(value, other[entry]) for entry, value in state.items())


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_is_kept_beside_samples_goes_on(name: str, tmp_path: Path) -> None:
    state, other = states_of_two_passes_and_of_one(REMEMBERING[name], tmp_path)
    if name == "icarl":
        assert torch.equal(state.pop("replay_buffer.tasks"), other.pop("replay_buffer.tasks") - 1)
    assert len(state) > 2
    for entry, value in state.items():
        torch.testing.assert_close(value, other[entry], rtol=0, atol=0, msg=entry)
    learnt(REMEMBERING[name](), tmp_path / "few", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "few", trust=["tests"])
    learnt(model.method, tmp_path / "more", part([4, 5, 6], increment=[1, 2]))
    again = mh_lightning.load(tmp_path / "more", trust=["tests"])
    queries, _ = blobs(30, 4)
    assert again.class_names == NAMES
    np.testing.assert_array_equal(again.predict(queries).probabilities, model.predict(queries).probabilities)


def states_of_two_passes_and_of_one(
    make: Callable[[], ContinualMethod], tmp_path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    (x, y), (q, v) = blobs(100, 1), blobs(40, 2)
    options = {"increment": 7, "batch_size": 10, "class_names": NAMES}
    learnt(make(), tmp_path / "first", Tensors(x[:50], y[:50], q, v, **options))
    model = mh_lightning.load(tmp_path / "first", trust=["tests"])
    buffer: Any = getattr(model.method, "replay_buffer", None)
    if buffer is not None:
        assert (len(buffer), buffer.seen) in ((21, 50), (18, 0))  # iCaRL has 21 // 7 of each of six classes
    else:
        buffer = ()
    model.save(tmp_path / "whole.mh")
    saved = mh_lightning.load(tmp_path / "whole.mh", trust=["tests"]).method
    assert len(getattr(saved, "replay_buffer", ())) == len(buffer)
    learnt(model.method, tmp_path / "second", Tensors(x[50:], y[50:], q, v, **options))
    domains = torch.arange(100) // 50
    both = Tensors(x, y, torch.cat([q, q]), torch.cat([v, v]), scenario="DI", domain_train=domains,
                   domain_test=torch.arange(80) // 40, **options)  # fmt: skip
    whole = learnt(make(), tmp_path / "whole", both)
    return model.method.state_dict(), whole.state_dict()


@pytest.mark.parametrize("name", REPLAYED)
def test_replay_goes_on_with_new_classes(name: str, tmp_path: Path) -> None:
    learnt(REPLAYED[name](), tmp_path / "first", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "first", trust=["tests"])
    learnt(model.method, tmp_path / "second", part([4, 5, 6], increment=[1, 2]))
    buffer: Any = model.method.replay_buffer
    inputs, targets, tasks, *_ = buffer.content()
    assert {*targets.tolist()} >= {0, 1, 2, 3, 5, 6} and {*tasks.tolist()} >= {-2, -1, 1} and len(inputs) == 21
    assert mh_lightning.load(tmp_path / "second", trust=["tests"]).class_names == NAMES
    learnt(model.method, tmp_path / "third", part([0, 6], increment=2))  # the same object, once more


def test_what_cannot_go_on_is_told(tmp_path: Path) -> None:
    learnt(ExperienceReplay(Identity(FEATURES), nn.Linear, buffer_size=3), tmp_path / "replay", part([0, 1]))
    with pytest.raises(UserError, match="buffer_size=3 is smaller than the 4 classes"):
        fit(mh_lightning.load(tmp_path / "replay").method, tmp_path / "x1", part([2, 3]))
    learnt(JointTraining(Identity(FEATURES), nn.Linear), tmp_path / "joint", part([0, 1]))
    with pytest.raises(UserError, match="JointTraining learns the samples of all tasks together"):
        fit(mh_lightning.load(tmp_path / "joint").method, tmp_path / "x5", part([2, 3]))
    tuned = GDumb(nn.Linear(FEATURES, 4), nn.Linear, buffer_size=9, epochs=1)
    learnt(tuned, tmp_path / "tuned", part([0, 1]))
    with pytest.raises(UserError, match="unless the backbone is frozen"):
        fit(tuned, tmp_path / "x6", part([2, 3]))
    learnt(FineTuning(Identity(FEATURES), nn.Linear), tmp_path / "first", part([0, 1]))
    data = part([2, 3])
    data.load = lambda: part([2, 3]).load()._replace(class_names=["pig", "pig"])  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the class name 'pig' is there twice"):
        fit(mh_lightning.load(tmp_path / "first").method, tmp_path / "x3", data)
    other = part([2, 3])
    other.image_transforms, type(other).published_normalization = "random_crop", IMAGENET  # type: ignore[misc]
    try:
        with pytest.raises(UserError, match=r"data.image_transforms=random_crop, .*: the model has learnt images"):
            fit(mh_lightning.load(tmp_path / "first").method, tmp_path / "x4", other)
    finally:
        type(other).published_normalization = None  # type: ignore[misc]


def write_images(folder: Path, names: list[str]) -> None:
    generator = np.random.default_rng(0)
    for name in names:
        colour = np.array([NAMES.index(name) * 30 + 30, 200 - NAMES.index(name) * 25, 90])
        for split, count in (("train", 6), ("test", 3)):
            for place in range(count):
                pixels = (colour + generator.integers(-15, 15, (24, 24, 3))).clip(0, 255).astype(np.uint8)
                path = folder / split / name / f"{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(TimmBackbone("test_resnet", image_size=32).model.state_dict(), tmp_path / "w.pth")
    write_images(tmp_path / "old", NAMES[:3])
    write_images(tmp_path / "new", NAMES[2:5])
    write_images(tmp_path / "all", NAMES[:5])
    model = ["--model=ClosedForm", "--model.backbone=TimmBackbone", "--model.backbone.name=test_resnet",
             "--model.backbone.image_size=32", "--model.head=mh_lightning.heads.KernelMemoryUnits"]  # fmt: skip
    common = ["--run_dir", str(tmp_path / "runs"), "--pictures=false", "--trainer.logger=false", "--data=ImageFolder"]
    main(["fit", *model, *common, f"--data.root={tmp_path / 'old'}", "--experiment=old"])
    parent = tmp_path / "runs" / "old" / "version_0"
    streams = [{"class_path": "ImageFolder", "init_args": {"root": str(tmp_path / "old")}}]
    callback = {"class_path": "mh_lightning.callbacks.EarlierTasks", "init_args": {"streams": streams}}
    (tmp_path / "earlier.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    main(["fit", "--continue-from", str(parent), *common, f"--data.root={tmp_path / 'new'}", "--experiment=new",
          f"--config={tmp_path / 'earlier.yaml'}"])  # fmt: skip
    child = tmp_path / "runs" / "new" / "version_0"
    assert mh_lightning.load(child).class_names == NAMES[:5]
    assert str(parent) in json.loads((child / "results.json").read_text())["parent"]["from"]
    assert f"continue_from: {parent}" in (child / "config.yaml").read_text()
    matrix = json.loads((child / "results.json").read_text())["parent"]["accuracy_matrix_of_both"]
    assert [[value is None for value in row] for row in matrix] == [[False] * 3 + [True] * 3] * 3 + [[False] * 6] * 3
    labels = mh_lightning.load(child).predict(sorted((tmp_path / "all" / "test").rglob("*.png"))).labels
    assert np.mean([label == name for label, name in zip(labels, np.repeat(NAMES[:5], 3), strict=True)]) > 0.8
    for words, message in (
        (["fit", f"--continue_from={tmp_path}", *common], "holds no checkpoints"),
        (["test", f"--continue_from={parent}", *common], "continue_from is for fit; test takes --from"),
        (["fit", f"--continue_from={parent}", "--model.backbone.image_size=48", *common,
          f"--data.root={tmp_path / 'new'}"],
         "trained with a backbone of image_size=32, and this one has 48"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def test_a_run_of_objects_goes_on_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learnt(FineTuning(nn.Sequential(nn.Linear(FEATURES, 4)), nn.Linear), tmp_path, part([0, 1]))
    with pytest.raises(SystemExit):
        main(["fit", "--continue-from", str(tmp_path), "--data=Digits"])
    assert "go on in Python, with mh_lightning.load and mh_lightning.fit" in capsys.readouterr().err


def increments() -> list[Any]:
    return [
        ([2, 3], r"data.increment=\[2, 3\] adds up to 5 classes, and the data have 7"),
        ([2, 0, 5], "data.increment must be at least 1, got 0"),
    ]


@pytest.mark.parametrize(("sizes", "message"), increments())
def test_increments_that_do_not_add_up(sizes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        part([0, 1, 2, 3, 4, 5, 6], increment=sizes).setup("fit")


@pytest.mark.parametrize("name", ["kernel", "means", "gaussians"])
def test_a_model_learns_a_few_more(name: str, tmp_path: Path) -> None:
    learnt(ClosedForm(Identity(FEATURES), HEADS[name]), tmp_path, part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path)
    x, y = blobs(90, 5)
    model.learn(x[:0], [])
    assert model.class_names == NAMES[:4]
    for rows in torch.split(torch.arange(90), 40):
        model.learn(x[rows], [NAMES[label] for label in y[rows]])
    order = [*NAMES[:4], *dict.fromkeys(NAMES[label] for label in y if NAMES[label] not in NAMES[:4])]
    assert model.class_names == order and set(order) == set(NAMES)
    head: Any = model.method.head
    head.settle()
    counts = {name: int(count) for name, count in zip(order, head.counts, strict=True)}
    assert counts["gnu"] == int((y == 6).sum())
    model.notes["last"] = ["x"]
    model.save(tmp_path / "more.mh")
    again = mh_lightning.load(tmp_path / "more.mh")
    assert again.class_names == order and again.notes == {"last": ["x"]}
    np.testing.assert_array_equal(again.predict(x).probabilities, model.predict(x).probabilities)
    right = np.mean([label == NAMES[target] for label, target in zip(again.predict(x).labels, y, strict=True)])
    assert right > 0.45
    with pytest.raises(UserError, match="3 samples were given, and 1 labels"):
        model.learn(x[:3], ["ant"])
    with pytest.raises(UserError, match="NaN or infinite"):
        model.learn(x[:2] * torch.nan, ["pig", "pig"])
    assert model.class_names == order and model.predict(x[:1]).probabilities.shape == (1, 7)


def test_a_head_that_learns_by_gradient_is_fit(tmp_path: Path) -> None:
    learnt(METHODS["linear"](), tmp_path, part([0, 1]))
    with pytest.raises(UserError, match="a Linear learns by gradient; go on with"):
        mh_lightning.load(tmp_path).learn(torch.zeros(1, FEATURES), ["ant"])


def test_earlier_tasks_are_measured_with_their_data(tmp_path: Path) -> None:
    """The stream of before, given again: classes are known by their names."""
    learnt(ClosedForm(Identity(FEATURES), HEADS["kernel"]), tmp_path / "first", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "first")
    learnt(model.method, tmp_path / "second", part([4, 5, 6], increment=3))
    model = mh_lightning.load(tmp_path / "second")
    trainer = mh_lightning.Trainer(run_dir=tmp_path / "tests", logger=False, accelerator="cpu", pictures=False,
                                   enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    old = part([0, 1, 2, 3])
    (found,) = trainer.test(model.method, datamodule=old)
    x, y = (old._splits["test"].inputs, old._splits["test"].labels)
    right = [model.class_names.index(label) == target for label, target in zip(model.predict(x).labels, y, strict=True)]
    assert found["test/last_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
