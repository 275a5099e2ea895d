"""Long streams: spaced evaluation and checkpoints, and nothing that grows with each step."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import long_streams
from mh_lightning.backbones import Identity
from mh_lightning.data import Tensors
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm
from tests.conftest import results_of, weights_of
from tests.fits import fit

Run = Callable[..., Path]
Refuses = Callable[..., str]
SPACED = ("--data.init_args.evaluate_every_n_tasks", "2", "--pictures", "false")


def test_three_hundred_tasks_have_three_rows(tmp_path: Path) -> None:
    tasks = 300
    label = torch.arange(2 * tasks) % 2
    domain = torch.arange(tasks).repeat_interleave(2)
    x = torch.stack([label.float(), domain / tasks], dim=1)
    data = Tensors(x, label, x, label, domain_train=domain, domain_test=domain, scenario="DI", increment=2,
                   evaluate_every_n_tasks=100)  # fmt: skip
    trainer = fit(ClosedForm(Identity(2), ClassMeans), tmp_path, data)
    results = json.loads((tmp_path / "results.json").read_text())
    matrix = torch.tensor(results["accuracy_matrix"])
    assert results["evaluated_after"] == [100, 200, 300] == [row["task"] for row in results["by_task"]]
    assert matrix.shape == (3, 300) and results["num_tasks"] == 300 and "tasks_trained" not in results
    changes = [matrix[1, 99] - matrix[0, 99], matrix[2, 99] - matrix[0, 99], matrix[2, 199] - matrix[1, 199]]
    assert results["all_pairs_backward_transfer"] == pytest.approx(float(sum(changes)) / 3)
    assert results["backward_transfer"] == pytest.approx(float(changes[1] + changes[2]) / 2)
    files = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert files == {"last.ckpt", "task_100.ckpt", "task_200.ckpt", "task_300.ckpt"}
    counts = torch.load(tmp_path / "checkpoints" / "task_200.ckpt", weights_only=True)["callbacks"]["ContinualMetrics"]
    assert {count.shape for count in counts["counts"]["test"].values()} == {(2, 300)}
    assert trainer.current_epoch == 300


def test_spaced_rows_are_those_of_all_evaluations(run: Run, tiny_config: Path) -> None:
    every, spaced = (run("fit", tiny_config, *options) for options in (SPACED[2:], SPACED))
    full, rows = results_of(every), results_of(spaced)
    assert rows["evaluated_after"] == [2, 3] and "evaluated_after" not in full
    for one, other in ((rows, full), (rows["validation"], full["validation"])):
        assert one["accuracy_matrix"] == other["accuracy_matrix"][1:]
        assert one["by_task"] == other["by_task"][1:]
        for name in (
            "average_accuracy",
            "last_accuracy",
            "last_accuracy_old",
            "last_accuracy_new",
            "last_accuracy_top5",
        ):
            assert one[name] == other[name]
    ours, theirs = weights_of(every), weights_of(spaced)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # evaluation leaves no trace
    assert {path.name for path in (spaced / "checkpoints").iterdir()} == {"last.ckpt", "task_2.ckpt", "task_3.ckpt"}
    events = EventAccumulator(str(spaced))
    events.Reload()
    for tag in ("test/average_accuracy", "test_accuracy_by_task/task_1", "memory_head/head/scrambles"):
        assert [event.step for event in events.Scalars(tag)] == [2, 3]


def test_resumed_spaced_run_equals_uninterrupted(run: Run, tiny_config: Path, refuses: Refuses) -> None:
    whole = run("fit", tiny_config, *SPACED)
    checkpoint = ("--ckpt_path", str(whole / "checkpoints" / "task_2.ckpt"))
    resumed = run("fit", tiny_config, *SPACED, *checkpoint)
    assert results_of(whole) == results_of(resumed)
    evaluated = run("test", tiny_config, *SPACED, *checkpoint)
    assert "test/accuracy" in (evaluated / "metrics.csv").read_text()
    assert "evaluate_every_n_tasks 2 -> 1" in refuses("fit", tiny_config, *checkpoint)


def test_checkpoints_follow_the_evaluations(run: Run, tiny_config: Path, refuses: Refuses) -> None:
    folder = run("fit", tiny_config, "--data.init_args.evaluate_every_n_tasks", "5", "--pictures", "false")
    assert results_of(folder)["evaluated_after"] == [3]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "task_3.ckpt"}
    assert "data.evaluate_every_n_tasks must be at least 1, got 0" in refuses(
        "fit", tiny_config, "--data.init_args.evaluate_every_n_tasks", "0"
    )


class Objects(Callback):
    """Counts what Python holds, after some steps."""

    found: list[tuple[int, int]]

    def __init__(self, steps: list[int]) -> None:
        Objects.found = []
        self._steps = steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        if batch_idx + 1 in self._steps:
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(one), torch.Tensor) for one in objects)
            self.found.append((tensors, len(objects)))


def test_an_online_stream_keeps_nothing_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr("mh_lightning.callbacks.online_accuracy.PENDING_STEPS", 100)
    config = tmp_path / "online.yaml"
    options = long_streams.settings(tmp_path, domains=1, samples=501, test_samples=8, batch_size=1)
    options["trainer"]["callbacks"] = [
        {"class_path": "tests.test_long_streams.Objects", "init_args": {"steps": [300, 500]}}
    ]
    config.write_text(yaml.safe_dump(options))
    folder = run("fit", config, "--trainer.enable_progress_bar", "true")
    (tensors, objects), (tensors_later, objects_later) = Objects.found
    assert tensors_later <= tensors  # fewer where garbage of earlier tests went meanwhile
    assert objects_later - objects < 100  # of the loggers and the bar, a part of a step's each
    assert (folder / "accuracy_over_stream.png").exists()
