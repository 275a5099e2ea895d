"""Pictures of the stream: what is drawn where."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

from mh_lightning import MHLinear
from mh_lightning.callbacks import OnlineAccuracy
from mh_lightning.callbacks.online_accuracy import PENDING_STEPS
from mh_lightning.callbacks.plots import (
    Plane,
    decision_surface_image,
    decision_surfaces_figure,
    online_accuracy_figure,
    preview_figure,
)
from mh_lightning.callbacks.stream_pictures import keys_in_the_plane
from tests.fits import on_two_ranks


def plane(**changes: Any) -> Plane:
    """Class 0 below, class 1 above; a sample of each, and a key in the middle and one outside."""
    classes = np.zeros((10, 10), dtype=np.int64)
    classes[5:] = 1
    values: dict[str, Any] = {
        "classes": classes,
        "extent": (-1.0, 1.0, -1.0, 1.0),
        "samples": np.array([[-0.5, -0.5], [0.5, 0.5]], np.float32),
        "labels": np.array([0, 1]),
        "keys": np.array([[0.0, 0.0], [5.0, 5.0]], np.float32),
        "title": "a title",
    }
    return Plane(**values | changes)


def test_keys_in_the_plane() -> None:
    head = MHLinear.published(2, 3, key_mem_units=4, distance="euclidean")
    assert keys_in_the_plane(head).shape == (4, 2)
    others = [
        MHLinear.published(size, 3, key_mem_units=4, distance=name) for size, name in ((2, "cosine"), (3, "euclidean"))
    ]
    for without in (*others, torch.nn.Linear(2, 2)):
        assert keys_in_the_plane(without).shape == (0, 2)


def test_decision_surface_image() -> None:
    image = decision_surface_image(plane(), scale=10)
    assert image.shape == (100, 100, 3) and image.dtype == np.uint8
    below, above = image[95, 50], image[5, 50]
    assert not np.array_equal(below, above) and min(*below, *above) > 100  # pale
    assert np.array_equal(image[95, 5], below) and np.array_equal(image[5, 95], above)
    sample_of_0, sample_of_1 = image[74, 25], image[25, 74]
    assert (sample_of_0 < below).any() and (sample_of_1 < above).any()  # the dots are darker
    assert image[50, 50].max() == 0  # the key is black; the other one is not in the picture
    assert (image.max(axis=2) == 0).sum() < 60


def test_planes_survive_a_checkpoint() -> None:
    plain = plane().as_plain()
    assert all(isinstance(value, torch.Tensor | str | tuple) for value in plain.values())
    again = Plane.from_plain(plain)
    for name, value in vars(plane()).items():
        assert np.array_equal(getattr(again, name), value)


def test_one_panel_a_task() -> None:
    planes = [plane(title=f"after task {task}") for task in range(1, 6)]
    figure = decision_surfaces_figure(planes, ["0", "1"])
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [f"after task {task}" for task in range(1, 6)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["class 0", "class 1", "keys"]


def test_running_accuracy() -> None:
    correct = np.array([1] * 40 + [0] * 20 + [1] * 40, np.uint8)
    (axes,) = online_accuracy_figure(correct, [0, 40]).axes
    line = axes.lines[0]
    values = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    found = [values[place] for place in (20, 40, 50, 60, 100)]
    assert np.allclose(found, [100, 100, 50, 0, 100], atol=1e-9)
    assert "80.0 %" in axes.get_title()
    assert [text.get_text() for text in axes.texts] == ["1", "2"]


def test_running_accuracy_of_a_long_stream() -> None:
    correct = np.random.default_rng(0).integers(0, 2, 300_000).astype(np.uint8)
    (axes,) = online_accuracy_figure(correct, list(range(0, 300_000, 100))).axes
    (line,) = axes.lines  # without the boundaries of 3000 tasks
    places, values = line.get_xdata(), line.get_ydata()
    assert places[0] == 6000 and places[-1] == 300_000 and len(places) <= 20_000
    for place in (0, 777, len(places) - 1):
        assert values[place] == pytest.approx(100 * correct[places[place] - 6000 : places[place]].mean())


def test_only_first_epochs_count_and_in_order() -> None:
    callback, datamodule = OnlineAccuracy(), SimpleNamespace(epochs_per_task=2)
    for epoch in range(4):
        trainer: Any = SimpleNamespace(datamodule=datamodule, current_epoch=epoch)
        callback.on_train_epoch_start(trainer, trainer)
        for correct in ([True, False], [epoch == 2]):
            callback.on_train_batch_end(trainer, trainer, {"correct": torch.tensor(correct)}, None, 0)
        callback.on_train_batch_end(trainer, trainer, None, None, 0)  # a method that says nothing
        module: Any = SimpleNamespace(device="cpu")
        callback.on_train_epoch_end(trainer, module)
    state = callback.state_dict()
    assert state["correct"].tolist() == [1, 0, 0, 1, 0, 1] and state["task_starts"] == [0, 3]


def learn(callback: OnlineAccuracy, samples: Iterable[int]) -> None:
    """A step for each sample."""
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(epochs_per_task=1), current_epoch=0)
    for sample in samples:
        callback.on_train_batch_end(trainer, trainer, {"correct": torch.tensor([sample % 3 == 0])}, None, 0)


def test_state_is_whole_inside_an_epoch() -> None:
    callback, resumed = OnlineAccuracy(), OnlineAccuracy()
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(epochs_per_task=1), current_epoch=0)
    callback.on_train_epoch_start(trainer, trainer)
    learn(callback, range(2500))
    assert len(callback._pending) < PENDING_STEPS  # what is kept apart has a bound
    state = callback.state_dict()
    assert state["correct"].tolist() == [sample % 3 == 0 for sample in range(2500)]
    assert state["correct"].untyped_storage().nbytes() == 2500  # a byte each, also in the file
    resumed.load_state_dict(state)
    learn(resumed, range(2500, 6000))
    learn(callback, range(2500, 6000))
    assert torch.equal(state["correct"], callback.state_dict()["correct"][:2500])
    for one in (callback, resumed):
        assert one.state_dict()["correct"].tolist() == [sample % 3 == 0 for sample in range(6000)]
        assert one.state_dict()["task_starts"] == [0]


def of_rank(rank: int, folder: Path) -> torch.Tensor:
    """Three global batches of 4, 4 and 2 samples, dealt out in turn: which are correct comes out in the stream's
    order.
    """
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    callback = OnlineAccuracy()
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(epochs_per_task=1), current_epoch=0)
    for correct in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 0]):
        callback.on_train_batch_end(trainer, trainer, {"correct": torch.tensor(correct[rank::2]).bool()}, None, 0)
    found: torch.Tensor = callback.state_dict()["correct"]
    return found


def test_samples_of_two_ranks_are_in_the_order_of_the_stream(tmp_path: Path) -> None:
    for found in on_two_ranks(of_rank, tmp_path):
        assert found.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 1, 0]


def test_preview() -> None:
    points = [(np.random.default_rng(0).normal(size=(5, 2)), np.arange(5) % 2)] * 3
    figure = preview_figure(points, ["a", "b", "c"], ["0", "1"])
    assert figure is not None and [axes.get_title() for axes in figure.axes if axes.axison] == ["a", "b", "c"]
    images = [(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, int)), (np.ones((1, 4, 4, 3), np.uint8), np.zeros(1, int))]
    figure = preview_figure(images, ["a", "b"], ["0"])
    assert figure is not None and [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert preview_figure([(np.zeros((2, 7)), np.zeros(2, int))], ["a"], ["0"]) is None
