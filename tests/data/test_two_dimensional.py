"""MODES and MOONS: equal to the published streams, and drawn as the options say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mh_lightning.data import Modes, Moons, StreamDataModule
from tests.data.refusal import refused
from tests.data.test_stream import attach

REFERENCE = Path(__file__).parents[1] / "modes_reference"
STREAMS = {"bi-modals": Modes, "bi-moons": Moons}
SPLITS = {"train": "train", "validation": "val", "test": "test"}


def ready(stream: StreamDataModule) -> StreamDataModule:
    stream.setup("fit")
    return stream


def points_of(stream: StreamDataModule, split: str, task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labelled = stream._splits[split].take(stream._samples_of_tasks[split][task])
    return labelled.inputs.numpy(), labelled.labels, labelled.domains


def as_set(*columns: np.ndarray) -> list[tuple[float, ...]]:
    return sorted(map(tuple, np.column_stack(columns).tolist()))


@pytest.mark.parametrize("scenario", ["IID", "CI", "CDI", "CDID"])
@pytest.mark.parametrize("name", STREAMS)
def test_equal_to_the_published_stream(name: str, scenario: str) -> None:
    published = np.load(REFERENCE / f"{name}_{scenario}.npz", allow_pickle=False)
    stream = ready(STREAMS[name](scenario=scenario, validation_tasks="first_half"))
    assert stream.num_tasks == {"IID": 1, "CI": 4, "CDI": 8, "CDID": 8}[scenario]
    for split, key in SPLITS.items():
        tasks = published[f"distributions_{key}"]
        seen = 0
        for task in range(stream.num_tasks):
            points, labels, domains = points_of(stream, split, task)
            assert points.dtype == np.float32
            expected = published[f"X_{key}"][tasks == task].astype(np.float32)
            assert as_set(points, labels) == as_set(expected, published[f"y_{key}"][tasks == task])
            if stream.num_tasks == 8:
                assert domains.tolist() == published[f"domain_{key}"][tasks == task].tolist()
            seen += len(points)
        assert seen == len(tasks) > 0
    halves = [min(len(points_of(stream, "validation", task)[0]), 1) for task in range(stream.num_tasks)]
    assert halves == {1: [1], 4: [1, 1, 0, 0], 8: [1] * 4 + [0] * 4}[stream.num_tasks]


@pytest.mark.parametrize("kind", [Modes, Moons])
def test_cdid_trains_in_the_order_of_the_first_coordinate(kind: Callable[..., StreamDataModule]) -> None:
    drifting, mixed = (ready(kind(scenario=scenario, batch_size=1)) for scenario in ("CDID", "CDI"))
    for task in range(8):
        first, other = (
            torch.cat([x for x, _, _ in attach(stream, epoch=task).train_dataloader()])[:, 0]
            for stream in (drifting, mixed)
        )
        assert torch.equal(first, first.sort().values)
        assert not torch.equal(other, first) and torch.equal(other.sort().values, first)


def test_counts_in_three_domains() -> None:
    """40 points: of each class 6, 6 and 8; every other one is for training, of the rest every other one for test."""
    stream = ready(
        Modes(
            num_samples=20,
            class_ratios=[0.5, 0.5],
            centres=[[[0, 0], [100, 0]], [[0, 100], [100, 100]], [[0, 200], [100, 200]]],
            spreads=[[0.01, 0.02]] * 3,
            seeds=[[1, 2], [3, 4], [5, 6]],
            scale=False,
            scenario="CDI",
        )
    )
    counts = {split: [stream.num_samples(split, task) for task in range(6)] for split in SPLITS}
    assert counts == {"train": [3, 3, 3, 3, 4, 4], "validation": [2, 2, 1, 1, 2, 2], "test": [1, 1, 2, 2, 2, 2]}
    for task in range(6):
        domain, label = divmod(task, 2)
        for split in SPLITS:
            points, labels, domains = points_of(stream, split, task)
            assert np.abs(points - [100 * label, 100 * domain]).max() < 0.1
            assert set(labels) == {label} and set(domains) == {domain}


def test_spread_of_each_cloud() -> None:
    spreads = [[0.5, 2.0], [1.0, 0.1]]
    options = {"centres": [[[0, 0], [9, 9]]] * 2, "seeds": [[1, 2], [3, 4]], "class_ratios": [0.6, 0.4]}
    stream = ready(Modes(num_samples=4000, spreads=spreads, scale=False, scenario="CDI", **options))
    assert [stream.num_samples("train", task) for task in range(4)] == [1200, 800, 1200, 800]
    for task in range(4):
        points, _, _ = points_of(stream, "train", task)
        assert points.std(axis=0) == pytest.approx(spreads[task // 2][task % 2], rel=0.1)


def test_moons_are_half_circles_around_their_offsets() -> None:
    offsets = [[[10.0, 0.0]], [[0.0, 20.0]]]
    stream = ready(Moons(100, [0.5, 0.5], offsets, [[0.0]] * 2, [[1], [2]], scale=False, scenario="CDI"))
    for task in range(4):
        domain, half = divmod(task, 2)
        points, _, _ = points_of(stream, "train", task)
        x, y = (points - offsets[domain][0] - [half, half / 2]).T
        assert np.hypot(x, y) == pytest.approx(1, abs=1e-5)
        assert (y <= 1e-5).all() if half else (y >= -1e-5).all()
    noisy = ready(Moons(100, [0.5, 0.5], offsets, [[0.3]] * 2, [[1], [2]], scale=False, scenario="CDI"))
    radius = np.hypot(*(points_of(noisy, "train", 0)[0] - offsets[0][0]).T)
    assert 0.1 < np.std(radius) < 0.5


@pytest.mark.parametrize("kind", [Modes, Moons])
def test_scale_and_seeds(kind: Callable[..., StreamDataModule]) -> None:
    def everything(**options: Any) -> np.ndarray:
        splits = kind(**options).load()
        return np.concatenate([part.inputs.numpy() for part in (splits.train, splits.validation, splits.test)])

    scaled, plain = everything(), everything(scale=False)
    assert scaled.min(axis=0).tolist() == [-1, -1] and scaled.max(axis=0).tolist() == [1, 1]
    spans = plain.max(axis=0) - plain.min(axis=0)
    expected = 2 * (plain - plain.min(axis=0)) / spans - 1
    assert np.abs(expected - scaled).max() < 1e-5
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(everything(), scaled)
    seeds = [[1, 2, 3, 4], [5, 6, 7, 8]] if kind is Modes else [[1, 2], [3, 4]]
    assert not np.array_equal(everything(seeds=seeds), scaled)


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        (Modes, {"class_ratios": [0.5, 0.4, 0.0, 0.1]}, ("data.class_ratios", "positive")),
        (Modes, {"class_ratios": [0.5, 0.1, 0.1, 0.1]}, ("data.class_ratios", "sum to 1")),
        (Modes, {"class_ratios": []}, ("data.class_ratios", "[]")),
        (Modes, {"num_samples": 0}, ("data.num_samples=0", "take more")),
        (Modes, {"num_samples": 20}, ("data.num_samples=20", "2 domains")),
        (Modes, {"class_ratios": [0.5, 0.5]}, ("data.centres", "(2, 2, 2)", "(2, 4, 2)")),
        (Modes, {"centres": [[[0.0], [0.0, 1.0]]]}, ("data.centres", "uneven lists")),
        (Modes, {"centres": [[[0.0, float("inf")]] * 4]}, ("data.centres", "inf")),
        (Modes, {"centres": []}, ("data.centres", "(1, 4, 2)", "(0,)")),
        (Modes, {"spreads": [[0.1] * 4]}, ("data.spreads", "(2, 4)", "(1, 4)")),
        (Modes, {"spreads": [[0.1] * 4, [-0.1] * 4]}, ("data.spreads", "-0.1")),
        (Modes, {"seeds": [[1, 2, 3], [1, 2, 3]]}, ("data.seeds", "(2, 3)")),
        (Modes, {"seeds": [[1, 2, 3, 4], [1, 2, 3, -4]]}, ("data.seeds", "-4")),
        (Moons, {"class_ratios": [0.2, 0.3, 0.5]}, ("data.class_ratios", "even number", "3")),
        (Moons, {"offsets": [[[0.0, 0.0]]] * 2}, ("data.offsets", "(2, 2, 2)", "(2, 1, 2)")),
        (Moons, {"noise": [[0.1]]}, ("data.noise", "(2, 2)")),
        (Moons, {"noise": [[0.1, float("nan")]] * 2}, ("data.noise", "nan")),
        (Moons, {"seeds": [[1, 2**32], [1, 2]]}, ("data.seeds", "4294967296")),
        (Moons, {"num_samples": -5}, ("data.num_samples=-5",)),
        (Modes, {"perturbations": [None]}, ("data.perturbations", "images")),
    ],
)
def test_refused_options(kind: Callable[..., StreamDataModule], options: dict[str, Any], parts: tuple[str]) -> None:
    refused(lambda: kind(**options).setup("fit"), *parts)
