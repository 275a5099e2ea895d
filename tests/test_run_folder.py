"""Each run has a folder of its own, by whatever option the place is given, and nothing in it is overwritten."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from mh_lightning.backbones import Identity
from mh_lightning.callbacks import PredictionWriter, TaskCheckpoints
from mh_lightning.cli import main
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm, FineTuning
from mh_lightning.run_folders import locked
from tests import fits
from tests.blobs import FEATURES
from tests.conftest import results_of, weights_of

Run = Callable[..., Path]
Refuses = Callable[..., str]
FAST = ("--pictures", "false", "--data.init_args.epochs_per_task", "1")
LAST = ("--ckpt_path", "last")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fit(config: Path, *options: str) -> None:
    main(["fit", "--config", str(config), *FAST, *options])


def test_the_trainers_root_is_the_folder_of_all_runs(tiny_config: Path, tmp_path: Path) -> None:
    root = ("--trainer.default_root_dir", str(tmp_path / "root"))
    versions = [tmp_path / "root" / "tiny" / f"version_{number}" for number in range(2)]
    fit(tiny_config, *root)
    whole = contents(versions[0])
    with pytest.warns(UserWarning, match="ended after task 2 of 3"):
        fit(tiny_config, *root, "--trainer.max_steps", "5")
    fit(tiny_config, *root, *LAST)
    assert sorted(versions[0].parent.iterdir()) == versions
    assert contents(versions[0]) == whole
    assert results_of(versions[1]) == results_of(versions[0])
    assert weights_of(versions[1])["head.M"].equal(weights_of(versions[0])["head.M"])


def test_what_has_no_checkpoint_is_left_alone(tiny_config: Path, tmp_path: Path) -> None:
    options = ("--run_dir", str(tmp_path / "runs"), "--trainer.enable_checkpointing", "false")
    fit(tiny_config, *options)
    (first,) = (tmp_path / "runs" / "tiny").iterdir()
    whole = contents(first)
    with pytest.warns(UserWarning, match="no checkpoint in .* yet; the run begins"):
        fit(tiny_config, *options, *LAST)
    assert contents(first) == whole
    assert (first.parent / "version_1" / "results.json").exists()


def test_the_table_of_another_run_is_no_loggers_to_remove(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    options = ("--run_dir", str(tmp_path / "runs"), "--trainer.logger", "CSVLogger", "--trainer.logger.name", "x",
               "--trainer.logger.save_dir", str(logs), "--trainer.logger.version", "0")  # fmt: skip
    fit(tiny_config, *options)
    (table,) = logs.rglob("metrics.csv")
    whole = table.read_bytes()
    with pytest.raises(SystemExit):
        fit(tiny_config, *options)
    assert "trainer.logger: " in (said := capsys.readouterr().err) and "is of another run" in said
    with locked(table.parent), pytest.raises(SystemExit):  # as if both had started at the same instant
        fit(tiny_config, *options)
    assert "trainer.logger: the run in" in capsys.readouterr().err
    assert table.read_bytes() == whole
    fit(tiny_config, *options, *LAST)  # the same run, which is at its end
    assert table.read_bytes() == whole


def test_a_resumed_run_that_fails_takes_no_earlier_work_with_it(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run_dir", str(tmp_path), "--experiment", "x", "--trainer.logger", "false")
    fit(tiny_config, *options)
    checkpoints = tmp_path / "x" / "version_0" / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    whole = contents(checkpoints)
    with pytest.raises(SystemExit):
        fit(tiny_config, *options, *LAST, "--data.init_args.path", "/nowhere.npz")
    assert "/nowhere.npz" in capsys.readouterr().err
    assert len(whole) == 3 and contents(checkpoints) == whole


@pytest.mark.parametrize(
    ("callbacks", "files"), [([TaskCheckpoints], ["checkpoints/last.ckpt", "results.json"]), ([], ["results.json"])]
)
def test_in_python_a_second_fit_overwrites_nothing(
    tmp_path: Path, callbacks: list[type[TaskCheckpoints]], files: list[str]
) -> None:
    def fit_there(**options: Path) -> None:
        fits.fit(
            ClosedForm(Identity(FEATURES), ClassMeans), tmp_path, callbacks=[kind() for kind in callbacks], **options
        )

    fit_there()
    for name in files:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
    whole = contents(tmp_path)
    with pytest.raises(UserError, match="is of another run, and would be overwritten; give the trainer another"):
        fit_there()
    assert contents(tmp_path) == whole
    for name in files:  # a checkpoint alone is work, too
        assert name == "results.json" or (tmp_path / "results.json").unlink() is None
    if callbacks:
        with pytest.raises(UserError, match=r"checkpoints/last.ckpt' is of another run"):
            fit_there()
        fit_there(resume=tmp_path / "checkpoints" / "task_2.ckpt")  # goes on there
        assert (tmp_path / "results.json").exists()


def test_predictions_are_not_overwritten(tmp_path: Path) -> None:
    method, data = FineTuning(Identity(FEATURES), nn.Linear), fits.stream()
    trainer = fits.fit(method, tmp_path, data, callbacks=[PredictionWriter()])
    trainer.predict(method, datamodule=data)
    stamp = os.stat(tmp_path / "predictions.csv")
    with pytest.raises(UserError, match=r"predictions.csv' is of another run"):
        trainer.predict(method, datamodule=data)
    assert os.stat(tmp_path / "predictions.csv") == stamp
