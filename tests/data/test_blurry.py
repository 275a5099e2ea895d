"""Streams without sharp borders, with few samples of some classes, and with wrong labels."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mh_lightning
from mh_lightning.backbones import Identity
from mh_lightning.data import GaussianSchedule, IBlurry, SiBlurry, StreamDataModule, Tensors
from mh_lightning.data.blurry import BlurryBorders, blurred
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import (
    EWC,
    SLCA,
    AveragedGEM,
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
)
from mh_lightning.methods.base import ContinualMethod
from tests.blobs import CLASSES, FEATURES, blobs

BLURS = [IBlurry(0.5, 0.2), SiBlurry(0.3, 0.5), GaussianSchedule(0.7)]


def stream(**options: Any) -> Tensors:
    (x, y), (q, v) = blobs(210, 1), blobs(70, 2)
    return Tensors(x, y, q, v, **{"increment": [3, 2, 2], "batch_size": 8} | options)


def prepared(**options: Any) -> Tensors:
    data = stream(**options)
    data.setup("fit")
    return data


def labels_of_tasks(data: StreamDataModule) -> list[Any]:
    labels = data._splits["train"].labels
    return [np.bincount(labels[part], minlength=CLASSES) for part in data._samples_of_tasks["train"]]


@pytest.mark.parametrize("blur", BLURS, ids=str)
@given(
    sizes=st.lists(st.integers(4, 30), min_size=2, max_size=6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_each_sample_comes_once(blur: BlurryBorders, sizes: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    sharp = [np.flatnonzero(labels == label) for label in range(len(sizes))]
    try:
        parts = blurred(blur, labels, sharp, np.random.default_rng(seed))
    except UserError as error:
        assert "leaves no training sample to task" in str(error)
        return
    assert sorted(np.concatenate(parts).tolist()) == [*range(len(labels))] and len(parts) == len(sizes)
    again = blurred(blur, labels, sharp, np.random.default_rng(seed))
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_the_disjoint_and_the_blurry_classes_of_i_blurry() -> None:
    sharp, data = prepared(), prepared(blurry_borders=IBlurry(disjoint=0.43, minor=0.2))
    before, after = np.array(labels_of_tasks(sharp)), np.array(labels_of_tasks(data))
    assert np.array_equal(before.sum(axis=0), after.sum(axis=0))
    disjoint = [label for label in range(CLASSES) if np.array_equal(before[:, label], after[:, label])]
    assert len(disjoint) == 3  # of seven
    for label in {*range(CLASSES)} - {*disjoint}:
        home, count = int(before[:, label].argmax()), int(before[:, label].sum())
        moved = np.delete(after[:, label], home)
        assert moved.sum() == round(0.2 * count) and moved.max() - moved.min() <= 1
    assert data.class_groups == sharp.class_groups


def test_si_blurry_has_tasks_of_random_sizes_and_test_samples_follow() -> None:
    sizes = {tuple(map(len, prepared(blurry_borders=SiBlurry(), split_seed=seed).class_groups)) for seed in range(12)}
    assert len(sizes) > 3 and all(sum(one) == CLASSES and min(one) > 0 for one in sizes)
    data = prepared(blurry_borders=SiBlurry(0.0, 0.6))
    tests = data._splits["test"]
    for group, part in zip(data.class_groups, data._samples_of_tasks["test"], strict=True):
        assert {*tests.labels[part].tolist()} == {*group}


def test_a_gaussian_schedule_comes_and_goes() -> None:
    data = prepared(increment=1, blurry_borders=GaussianSchedule(1.0))
    counts = np.array(labels_of_tasks(data))
    sizes = counts.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    middle = (counts * np.arange(CLASSES)[:, None]).sum(axis=0) / counts.sum(axis=0)
    assert (np.diff(middle) > 0).all() and (np.count_nonzero(counts, axis=0) > 1).mean() > 0.8
    narrow = np.array(labels_of_tasks(prepared(increment=1, blurry_borders=GaussianSchedule(0.01))))
    assert np.count_nonzero(narrow) <= 2 * CLASSES - 1  # one class after the other, cut at seven places


def test_the_longest_tail() -> None:
    plain, data = prepared(), prepared(imbalance_ratio=10.0)
    before, after = (sum(labels_of_tasks(one)) for one in (plain, data))
    parts = np.sort(after / before)[::-1]
    np.testing.assert_allclose(parts, 10.0 ** -(np.arange(CLASSES) / (CLASSES - 1)), atol=0.03)
    assert len(data._splits["test"].labels) == len(plain._splits["test"].labels)


def test_wrong_labels_stay_in_their_task_and_out_of_validation() -> None:
    options = {"validation_fraction": 0.3}
    plain, data = prepared(**options), prepared(label_noise=0.3, **options)
    wrong = plain._splits["train"].labels != data._splits["train"].labels
    assert wrong.mean() == pytest.approx(0.3, abs=0.03)
    for group in plain.class_groups:
        assert {*data._splits["train"].labels[np.isin(plain._splits["train"].labels, group)].tolist()} == {*group}
    for split in ("test", "validation"):
        assert np.array_equal(plain._splits[split].labels, data._splits[split].labels)


@pytest.mark.parametrize("increment", [1, 7])
def test_wrong_labels_where_tasks_have_all_classes(increment: int) -> None:
    (x, y), (q, v) = blobs(210, 1), blobs(70, 2)
    domains = {"domain_train": torch.arange(210) % 2, "domain_test": torch.arange(70) % 2}
    for scenario in ("DI", "IID"):
        data = Tensors(x, y, q, v, scenario=scenario, increment=increment, label_noise=0.3, **domains)
        data.setup("fit")
        assert (data._splits["train"].labels != y.numpy()).mean() == pytest.approx(0.3, abs=0.03)


LEARNS = partial(torch.optim.SGD, lr=0.3)
LEARN_WITHOUT: list[ContinualMethod] = [
    FineTuning(Identity(FEATURES), mh_lightning.MHLinear, optimizer=LEARNS),
    ClosedForm(Identity(FEATURES), ClassMeans),
    Ensemble(Identity(FEATURES), nn.Linear, optimizer=LEARNS, members=2),
    ExperienceReplay(Identity(FEATURES), nn.Linear, optimizer=LEARNS, buffer_size=20),
    DERPlusPlus(Identity(FEATURES), nn.Linear, optimizer=LEARNS, buffer_size=20),
    MaximallyInterferedRetrieval(Identity(FEATURES), nn.Linear, optimizer=LEARNS, buffer_size=20),
    GDumb(Identity(FEATURES), nn.Linear, optimizer=LEARNS, buffer_size=20, epochs=20),
    JointTraining(Identity(FEATURES), nn.Linear, optimizer=LEARNS, epochs=1),
]
NEED_BORDERS: list[ContinualMethod] = [
    EWC(Identity(FEATURES), nn.Linear),
    LwF(Identity(FEATURES), nn.Linear),
    SLCA(Identity(FEATURES), nn.Linear),
    AveragedGEM(Identity(FEATURES), nn.Linear, buffer_size=20),
    ICaRL(Identity(FEATURES), nn.Linear, buffer_size=20),
]


def fit(method: ContinualMethod, folder: Path, data: StreamDataModule, **options: Any) -> mh_lightning.Results:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "pictures": False}
    return mh_lightning.fit(method, data, run_dir=folder, accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("method", LEARN_WITHOUT, ids=lambda method: type(method).__name__)
def test_methods_without_borders(method: ContinualMethod, tmp_path: Path) -> None:
    results = fit(method, tmp_path, stream(blurry_borders=SiBlurry(0.2, 0.5)))
    assert len(results["accuracy_matrix"]) == 3 and results["incremental_accuracy"] > 0.25


@pytest.mark.parametrize("method", NEED_BORDERS, ids=lambda method: type(method).__name__)
def test_methods_that_need_borders(method: ContinualMethod, tmp_path: Path) -> None:
    for options in ({"blurry_borders": IBlurry()}, {"announces_tasks": False}):
        with pytest.raises(UserError, match=f"{type(method).__name__} needs the borders of tasks"):
            fit(method, tmp_path, stream(**options))
    assert not any(tmp_path.iterdir())


def test_options_that_need_borders(tmp_path: Path) -> None:
    for option in ({"classes_in_loss": "task"}, {"reset_optimizer": True}):
        with pytest.raises(UserError, match=f"model.init_args.{next(iter(option))}=.* leave it out"):
            fit(FineTuning(Identity(FEATURES), nn.Linear, **option), tmp_path, stream(announces_tasks=False))

    class Silent(EWC):
        needs_task_borders = False

    fit(Silent(Identity(FEATURES), nn.Linear), tmp_path, stream(announces_tasks=False))


def test_the_head_in_closed_form_does_not_mind(tmp_path: Path) -> None:
    states = []
    for blur in (None, *BLURS):
        method = ClosedForm(Identity(FEATURES), ClassMeans)
        fit(method, tmp_path, stream(blurry_borders=blur))
        states.append(method.closed_form_head.sums)
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blurry_borders": IBlurry(), "scenario": "IID"}, "data.scenario=IID has no borders to blur"),
        ({"blurry_borders": IBlurry(), "increment": 7}, "data.blurry_borders needs a stream of two tasks"),
        ({"imbalance_ratio": 0.5}, "data.imbalance_ratio must be at least 1"),
        ({"label_noise": 1.0}, "data.label_noise must lie in"),
        ({"label_noise": 0.2, "increment": 1}, "a task has one class"),
        (
            {"blurry_borders": SiBlurry(0.0, 1.0), "max_train_samples": 7, "increment": 1},
            "leaves no training sample to task",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(**options)


@pytest.mark.parametrize("make", [lambda: IBlurry(1.5), lambda: SiBlurry(minor=-0.1), lambda: GaussianSchedule(0.0)])
def test_blurs_out_of_range(make: Any) -> None:
    with pytest.raises(UserError, match=r"data.blurry_borders: \w+.\w+ must"):
        make()


def test_from_yaml_and_resumed(tmp_path: Path) -> None:
    from mh_lightning.cli import main

    options = ["fit", "--config", "streams/modes_ci.yaml", "--config", "methods/er_reservoir.yaml", "--run_dir",
               str(tmp_path), "--pictures", "false", "--trainer.logger", "false", "--data.blurry_borders", "SiBlurry",
               "--data.blurry_borders.minor", "0.3", "--data.label_noise", "0.1",
               "--data.imbalance_ratio", "5", "--data.increment", "2"]  # fmt: skip
    main(options)
    run = tmp_path / "modes_ci_er_reservoir" / "version_0"
    whole = json.loads((run / "results.json").read_text())
    main([*options, "--ckpt_path", str(run / "checkpoints" / "task_2.ckpt")])
    again = json.loads((tmp_path / "modes_ci_er_reservoir" / "version_1" / "results.json").read_text())
    assert whole["accuracy_matrix"] == again["accuracy_matrix"]
    for option, value in (("blurry_borders.minor", "0.4"), ("label_noise", "0.2"), ("imbalance_ratio", "2")):
        with pytest.raises(SystemExit):
            main([*options, f"--data.{option}={value}", "--ckpt_path", str(run / "checkpoints" / "task_2.ckpt")])
