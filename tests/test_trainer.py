"""`mh_lightning.Trainer` and `mh_lightning.fit`: Python has what the command line has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import mh_lightning
from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import ContinualMetrics, TaskBoundaries, TaskCheckpoints
from mh_lightning.data import TensorFile
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm, FineTuning
from tests.blobs import FEATURES
from tests.conftest import FEATURES as TINY_FEATURES
from tests.conftest import results_of, weights_of
from tests.fits import stream

Run = Callable[..., Path]
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def linear(**options: Any) -> FineTuning:
    return FineTuning(Identity(FEATURES), nn.Linear, **options)


def tiny(path: Path) -> tuple[FineTuning, TensorFile]:
    """What `tests.conftest.TINY` says, in Python."""

    def head(features: int, classes: int) -> MHLinear:
        return MHLinear(features, classes, key_mem_units=8, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", gamma_alpha=5,
                        distance="euclidean", scramble=True, tau_alpha=0.95, tau_mu=5, tau_eta=5)  # fmt: skip

    method = FineTuning(
        Identity(TINY_FEATURES),
        head,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2),
        reset_optimizer=True,
    )
    options: dict[str, Any] = {"increment": 2, "epochs_per_task": 2, "batch_size": 16, "validation_fraction": 0.2}
    return method, TensorFile(str(path), **options)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows as curves, and the names of its pictures; texts are the command line's own."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    shown = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return shown | {name: [(one.step, len(one.encoded_image_string)) for one in events.Images(name)]
                    for name in events.Tags()["images"]}  # fmt: skip


def test_a_script_gives_what_the_command_line_gives(tiny_config: Path, tiny_stream: Path, run: Run) -> None:
    by_command = run("fit", tiny_config)
    seed_everything(3)
    results = mh_lightning.fit(*tiny(tiny_stream), run_dir=by_command.parents[1], experiment="script", **QUIET)
    by_script = by_command.parents[1] / "script" / "version_0"
    assert results.folder == by_script
    assert results_of(by_script) == results_of(by_command)
    assert dict(results) == json.loads((by_script / "results.json").read_text())
    ours, theirs = weights_of(by_script), weights_of(by_command)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert curves(by_script) == curves(by_command)
    for name in ("accuracy_matrix.png", "data_preview.png", "metrics.csv"):
        pair = [folder / name for folder in (by_script, by_command)]
        assert [path.exists() for path in pair] in ([True, True], [False, False])
        assert not pair[0].exists() or pair[0].read_bytes() == pair[1].read_bytes()
    files = [{path.name for path in folder.rglob("*") if "tfevents" not in path.name} for folder in
             (by_script, by_command)]  # fmt: skip
    assert files[1] - files[0] == {"config.yaml"} and not files[0] - files[1]
    assert "accuracy_matrix.png" in files[0] and "last.ckpt" in files[0]


def test_a_fit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = QUIET | {"run_dir": tmp_path, "pictures": False}
    seed_everything(5)
    whole = mh_lightning.fit(linear(), stream(), experiment="whole", **options)
    seed_everything(5)
    with pytest.warns(UserWarning, match="ended after task 2 of 3"):
        mh_lightning.fit(linear(), stream(), experiment="stopped", max_steps=20, **options)
    seed_everything(5)
    partial = tmp_path / "stopped" / "version_0" / ".results.json.1.tmp"  # as a kill leaves it
    partial.touch()
    resumed = mh_lightning.fit(linear(), stream(), experiment="stopped", ckpt_path="last", **options)
    assert not partial.exists()
    assert resumed.folder == tmp_path / "stopped" / "version_0"
    assert results_of(resumed.folder) == results_of(whole.folder)
    assert weights_of(resumed.folder)["head.weight"].equal(weights_of(whole.folder)["head.weight"])
    with (whole.folder / "metrics.csv").open() as one, (resumed.folder / "metrics.csv").open() as other:
        assert one.read() == other.read()


def test_each_fit_has_a_folder_and_evaluations_stay_in_it(tmp_path: Path) -> None:
    options = QUIET | {"run_dir": tmp_path, "pictures": False, "logger": False}
    method, data = linear(), stream()
    trainer = mh_lightning.Trainer(**options)
    assert trainer.run_folder is None and not any(tmp_path.iterdir())
    trainer.fit(method, data)
    assert trainer.run_folder == tmp_path / "experiment" / "version_0"
    trainer.predict(method, data)
    assert (trainer.run_folder / "predictions.csv").exists()
    with pytest.raises(UserError, match=r"has learnt a stream already; make a new mh_lightning\.Trainer"):
        trainer.fit(method, data)
    other = mh_lightning.Trainer(**options)
    other.test(linear(), data, ckpt_path="last")
    assert other.run_folder == tmp_path / "experiment" / "version_1"


def test_the_callbacks_that_are_given_replace_their_kind() -> None:
    given: list[Callback] = [TaskCheckpoints(minutes=3), ContinualMetrics(figures=False)]
    trainer = mh_lightning.Trainer(callbacks=given, **QUIET)
    kinds = [type(one) for one in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds[0] is TaskBoundaries and len(kinds) == len(set(kinds))
    assert all(one in trainer.callbacks for one in given)  # type: ignore[attr-defined]
    bare = mh_lightning.Trainer(enable_checkpointing=False, pictures=False, **QUIET)
    assert not bare.checkpoint_callbacks


def test_a_refused_fit_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contradicts the stream's 3 tasks"):
        mh_lightning.fit(linear(), stream(), run_dir=tmp_path, max_epochs=10, **QUIET)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"weights_only=False would let a checkpoint run code"):
        mh_lightning.Trainer(run_dir=tmp_path, **QUIET).fit(linear(), stream(), weights_only=False)
    with pytest.raises(UserError, match=r"no checkpoint in .*; fit first"):
        mh_lightning.Trainer(run_dir=tmp_path, **QUIET).test(linear(), stream(), ckpt_path="last")


def test_without_a_seed_it_is_the_command_lines(tmp_path: Path) -> None:
    found = [
        mh_lightning.fit(ClosedForm(nn.Identity(), ClassMeans), stream(), run_dir=tmp_path, pictures=False, **QUIET)
        for _ in range(2)
    ]
    assert [one["seed"] for one in found] == [0, 0]
    assert found[0].accuracy_matrix.tolist() == found[1].accuracy_matrix.tolist()


def test_a_plain_trainer_is_told_what_to_use(tmp_path: Path) -> None:
    plain = lightning.pytorch.Trainer(max_epochs=10, default_root_dir=tmp_path, logger=False, **QUIET)
    with pytest.raises(UserError, match=r"use mh_lightning\.Trainer"):
        plain.fit(linear(), datamodule=stream())


@pytest.mark.filterwarnings("error:.*smaller than the logging interval")
@pytest.mark.parametrize(("batch_size", "given", "steps"), [(1, None, 2), (8, None, 1), (1, 20, 20)])
def test_curves_have_ten_points_an_epoch(batch_size: int, given: int | None, steps: int, tmp_path: Path) -> None:
    """The first task has 26 samples, which are as many batches of one, or four of up to eight."""
    trainer = mh_lightning.Trainer(run_dir=tmp_path, log_every_n_steps=given, pictures=False, **QUIET)
    seen: list[int] = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.log_every_n_steps)

    trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
    trainer.fit(linear(), datamodule=stream(batch_size=batch_size))
    assert seen[0] == steps
    rows = [line for line in (trainer.run_folder / "metrics.csv").read_text().splitlines() if line]  # type: ignore[operator]
    assert len(rows) > 3
