"""Continual metrics where Lightning looks for them, and metrics of one's own, from YAML and Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import mh_lightning
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import ContinualMetrics
from mh_lightning.methods import FineTuning
from tests.blobs import FEATURES
from tests.fits import stream
from tests.metrics.evaluations import worst_task

Run = Callable[..., Path]
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
                         "pictures": False}  # fmt: skip
BY_YAML = """
trainer:
  callbacks:
  - class_path: mh_lightning.callbacks.ContinualMetrics
    init_args: {extra: {worst_task: tests.metrics.evaluations.worst_task}, figures: false}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {monitor: validation/worst_task, mode: max, filename: best}
"""


def test_all_values_are_where_lightning_looks(tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="validation/average_accuracy", mode="max", save_top_k=-1)
    stops = EarlyStopping(
        "test/last_accuracy_old", mode="min", stopping_threshold=1.0, strict=False, check_on_train_epoch_end=False
    )
    metrics = ContinualMetrics(figures=False, extra={"worst_task": worst_task})
    data = stream(validation_fraction=0.2)
    scheduler: list[ReduceLROnPlateau] = []

    def plateau(optimizer: Any) -> ReduceLROnPlateau:
        scheduler.append(ReduceLROnPlateau(optimizer))
        scheduler[0].monitor = "validation/average_accuracy"  # type: ignore[attr-defined]
        return scheduler[0]

    trainer = mh_lightning.Trainer(run_dir=tmp_path, callbacks=[metrics, best, stops], **QUIET)
    method = FineTuning(Identity(FEATURES), nn.Linear, lr_scheduler=plateau)
    with pytest.warns(UserWarning, match=r"ended after task 2 of 3 \(one of trainer.callbacks stopped it\)"):
        trainer.fit(method, data)  # the first task has no earlier one, so the second evaluation stops it
    assert trainer.run_folder is not None
    results = json.loads((trainer.run_folder / "results.json").read_text())
    for name in ("average_accuracy", "forgetting", "incremental_accuracy", "worst_task"):
        assert trainer.callback_metrics[f"test/{name}"].item() == pytest.approx(results[name])
        assert trainer.callback_metrics[f"validation/{name}"].item() == pytest.approx(results["validation"][name])
    assert best.best_model_score is not None and len(best.best_k_models) == 2
    assert scheduler[0].best == pytest.approx(min(map(float, best.best_k_models.values())))
    (found,) = trainer.test(method, data)
    assert found["test/worst_task"] == pytest.approx(min(results["accuracy_matrix"][-1]))
    assert found["test/last_accuracy"] > 0 and "validation/worst_task" not in found


def test_extra_metrics_by_yaml_and_what_tensorboard_compares(tiny_config: Path, run: Run) -> None:
    text = tiny_config.read_text()
    tiny_config.write_text(text[: text.index("trainer:")] + BY_YAML)
    options = ("--trainer.accelerator", "cpu", "--pictures", "false", "--trainer.enable_progress_bar", "false")
    folder = run("fit", tiny_config, *options)
    results = json.loads((folder / "results.json").read_text())
    assert results["worst_task"] == min(results["accuracy_matrix"][-1])
    assert (folder / "checkpoints" / "best.ckpt").exists()
    assert "worst task" in (folder / "metrics.csv").read_text().replace("_", " ")
    events = EventAccumulator(str(folder))
    events.Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for told in (b"data.increment", b"model.head.key_mem_units", b"seed_everything", b"Adam"):
        assert told in data
    assert b"test/worst_task" in events.SummaryMetadata("_hparams_/experiment").plugin_data.content
