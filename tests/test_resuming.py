"""A run that is killed anywhere and gone on with ends as one that was not; what cannot be gone on with is refused."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import TaskCheckpoints
from mh_lightning.cli import STOPPED_BY_SIGTERM
from mh_lightning.errors import UserError
from mh_lightning.methods import ClassifierAlignment, FineTuning
from mh_lightning.methods.base import ContinualMethod
from mh_lightning.run_folders import locked
from tests import fits
from tests.blobs import FEATURES
from tests.conftest import results_of, weights_of
from tests.interrupted import CONFIGURATIONS, Interrupted, every_configuration
from tests.kills import KILLED, at_call, kill_now, run_in_child, terminate_now

Run = Callable[..., Path]
Refuses = Callable[..., str]
LAST = ("--ckpt_path", "last")
ALIGNMENT = "alignment on kept features"


@every_configuration
def test_killed_at_random_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    run = Interrupted(name, tmp_path)
    steps = random.Random(name)
    for _ in range(2):  # by steps, which a loaded machine does not change
        number = steps.randint(2, 9)
        hook = "on_train_batch_end" if name == "experience replay" else "on_before_optimizer_step"
        assert run.go_on(lambda hook=hook, number=number: at_call(ContinualMethod, hook, number, kill_now)) == KILLED
    run.kill_at_random(0, kills=1)
    run.assert_equal_in_the_end()


def test_killed_where_it_hurts_equals_uninterrupted(tmp_path: Path) -> None:
    run = Interrupted(ALIGNMENT, tmp_path)
    for owner, function, number, after in (
        (Path, "replace", 2, False),  # features are written, but not yet in their place
        (Path, "replace", 1, True),
        (os, "fsync", 5, False),  # a checkpoint is written, but not yet in its place
        (os, "fsync", 5, True),
        (shutil, "copyfile", 1, True),  # the checkpoint of a task
        (ClassifierAlignment, "_loss", 9, False),
        (ContinualMethod, "validation_step", 2, False),
        (json, "dumps", 1, False),  # the results
    ):
        code = run.go_on(lambda call=(owner, function, number, kill_now, after): at_call(*call))
        assert code == KILLED, (function, (tmp_path / "killed.log").read_text())
    run.assert_equal_in_the_end()


def test_sigterm_saves_and_ends(tmp_path: Path) -> None:
    run = Interrupted("experience replay", tmp_path)
    assert (
        run.go_on(lambda: at_call(ContinualMethod, "on_before_optimizer_step", 2, terminate_now)) == STOPPED_BY_SIGTERM
    )
    assert "stopped by SIGTERM; the same command with --ckpt_path last goes on" in (tmp_path / "killed.log").read_text()
    last = torch.load(run.killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (0, 2)
    assert run.go_on(in_evaluation_under_slurm) == STOPPED_BY_SIGTERM
    assert not list(run.killed.rglob("hpc_ckpt*"))
    last = torch.load(run.killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["tasks_trained"] == 1
    run.assert_equal_in_the_end()
    assert "Going on with task 1 of 3, epoch 1 of 1, after batch 2 of 3" in (tmp_path / "killed.log").read_text()


def in_evaluation_under_slurm() -> None:
    os.environ |= {f"SLURM_{name}": value for name, value in (
        ("JOB_ID", "7"), ("JOB_NAME", "train"), ("NTASKS", "1"), ("NTASKS_PER_NODE", "1"), ("NNODES", "1"),
        ("PROCID", "0"), ("LOCALID", "0"), ("NODEID", "0"), ("NODELIST", "localhost"),
    )}  # fmt: skip
    at_call(ContinualMethod, "validation_step", 1, terminate_now)


@pytest.fixture
def finished(run: Run, tiny_config: Path) -> Path:
    """The run folder of a whole run."""
    return run("fit", tiny_config)


def go_on(config: Path, runs: Path, log: Path, *options: str) -> int:
    return run_in_child(["fit", "--config", str(config), "--run_dir", str(runs), *LAST, *options], log)


def damage(checkpoint: Path, kind: str) -> None:
    content = bytearray(checkpoint.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    elif kind == "one bit":
        place = content.find(torch.load(checkpoint, weights_only=True)["state_dict"]["head.M"].numpy().tobytes()[:64])
        content[place] ^= 1
    else:
        content.clear()
    checkpoint.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "one bit", "empty"])
def test_an_older_whole_checkpoint_is_taken(finished: Path, tiny_config: Path, tmp_path: Path, kind: str) -> None:
    expected, weights, log = results_of(finished), weights_of(finished), tmp_path / "log"
    checkpoints = finished / "checkpoints"
    (finished / "results.json").unlink()
    for name in ("last", "task_3"):
        damage(checkpoints / f"{name}.ckpt", kind)
    assert go_on(tiny_config, tmp_path / "runs", log) == 0
    told = log.read_text()
    assert re.search(r"last\.ckpt' cannot be read; it is damaged", told) and "Going on with task 3 of 3" in told
    assert results_of(finished) == expected
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(finished).items())
    for path in checkpoints.iterdir():
        damage(path, kind)
    assert go_on(tiny_config, tmp_path / "runs", log) == 2
    assert "no checkpoint in" in log.read_text() and "leave --ckpt_path out" in log.read_text()


def test_last_without_a_run_begins_one(run: Run, refuses: Refuses, tiny_config: Path, finished: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint in .* yet; the run begins"):
        fresh = run("fit", tiny_config, *LAST, "--experiment", "other")
    assert results_of(fresh) == results_of(finished)
    assert "fit first" in refuses("test", tiny_config, *LAST)


def test_evaluation_takes_the_last_fit_not_the_last_folder(
    run: Run, tiny_config: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = [run("test", tiny_config, *options) for options in (LAST, LAST)]
    assert len({finished, *evaluated}) == 3
    accuracy = f"{100 * results_of(finished)['last_accuracy']:.1f} %"
    assert capsys.readouterr().out.count(f"Accuracy on the test samples of all classes: {accuracy}") == 2


def test_a_run_that_is_still_going_on_is_left_alone(finished: Path, tiny_config: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with locked(finished):
        assert go_on(tiny_config, tmp_path / "runs", log) == 2
    assert "still going on" in log.read_text()
    assert go_on(tiny_config, tmp_path / "runs", log) == 0


def test_options_that_may_change_are_told(run: Run, tiny_config: Path, finished: Path) -> None:
    checkpoint = str(finished / "checkpoints" / "task_2.ckpt")
    with pytest.warns(UserWarning, match="with other options") as warned:
        resumed = run("fit", tiny_config, "--ckpt_path", checkpoint, "--data.init_args.eval_batch_size", "7",
                      "--trainer.log_every_n_steps", "3", "--pictures", "false")  # fmt: skip
    (told,) = (str(one.message) for one in warned if "with other options" in str(one.message))
    assert told.endswith("data.init_args.eval_batch_size 128 -> 7, trainer.log_every_n_steps None -> 3.")
    assert results_of(resumed) == results_of(finished)


def test_options_that_cannot_change_are_refused_together(refuses: Refuses, tiny_config: Path, finished: Path) -> None:
    checkpoint = str(finished / "checkpoints" / "task_2.ckpt")
    sentence = refuses("fit", tiny_config, "--ckpt_path", checkpoint, "--data.init_args.batch_size", "8",
                       "--trainer.accumulate_grad_batches", "2", "--model.init_args.loss", "hinge",
                       "--data.init_args.num_workers", "1")  # fmt: skip
    for change in ("batch_size 16 -> 8", "accumulate_grad_batches 1 -> 2", "loss cross_entropy -> hinge"):
        assert change in sentence
    assert "num_workers" not in sentence


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.precision", "64-true"], "precision 32-true -> 64-true"),
        (["--trainer.precision", "bf16-mixed"], "precision 32-true -> bf16-mixed"),
        (["--trainer.limit_val_batches", "0"], "limit_val_batches None -> 0"),
        (["--trainer.sync_batchnorm", "true"], "sync_batchnorm False -> True"),
        (["--trainer.use_distributed_sampler", "true"], "use_distributed_sampler False -> True"),
        (["--trainer.plugins", "lightning.pytorch.plugins.DoublePrecision"], "plugins"),
        (["--trainer.callbacks+=EMAWeightAveraging"], "callbacks"),
        (["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={1: 2}"], "callbacks"),
    ],
)
def test_what_changes_the_numbers_of_a_trainer_is_refused(
    refuses: Refuses, tiny_config: Path, finished: Path, options: list[str], told: str
) -> None:
    sentence = refuses("fit", tiny_config, "--ckpt_path", str(finished / "checkpoints" / "task_2.ckpt"), *options)
    assert "cannot change in a run" in sentence and f"trainer.{told}" in sentence, sentence


def test_what_changes_no_numbers_may_change(run: Run, tiny_config: Path, finished: Path) -> None:
    checkpoint = str(finished / "checkpoints" / "task_2.ckpt")
    options = ("--trainer.precision", "32", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=0",
               "--trainer.callbacks+=mh_lightning.callbacks.RankConsistency", "--trainer.strategy", "ddp",
               "--num_threads", "1")  # fmt: skip
    with pytest.warns(UserWarning, match=r"num_threads None -> 1, trainer.strategy auto -> ddp.$"):
        resumed = run("fit", tiny_config, "--ckpt_path", checkpoint, *options)
    torch.distributed.destroy_process_group()  # a later fit in a forked process would wait for this one
    assert results_of(resumed) == results_of(finished)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "64-true"},
        {"gradient_clip_val": 0.5},
        {"limit_train_batches": 2},
        {"limit_train_batches": 1},  # and not 1.0, which is all
        {"limit_val_batches": 0},
        {"overfit_batches": 1.0},
        {"accumulate_grad_batches": 2},
        {"sync_batchnorm": True},
        {"callbacks": [EMAWeightAveraging()]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_in_python_a_trainer_goes_on_as_it_began(tmp_path: Path, options: dict[str, Any]) -> None:
    fits.fit(FineTuning(Identity(FEATURES), torch.nn.Linear), tmp_path / "whole")
    (name,) = options
    with pytest.raises(UserError, match=rf"ckpt_path: the run began with trainer\.{name}=.* cannot change in a run"):
        fits.fit(FineTuning(Identity(FEATURES), torch.nn.Linear), tmp_path / "other",
                 resume=tmp_path / "whole" / "checkpoints" / "task_1.ckpt", **options)  # fmt: skip


def test_one_batch_is_not_all_of_them(run: Run, refuses: Refuses, tiny_config: Path) -> None:
    whole = run("fit", tiny_config, "--trainer.limit_train_batches", "1.0")
    checkpoint = str(whole / "checkpoints" / "task_2.ckpt")
    sentence = refuses("fit", tiny_config, "--trainer.limit_train_batches", "1", "--ckpt_path", checkpoint)
    assert "trainer.limit_train_batches 1.0 -> 1" in sentence


def test_in_python_the_schedule_of_accumulation_stays(tmp_path: Path) -> None:
    def fit(name: str, scheduling: dict[int, int], resume: Path | None = None) -> Trainer:
        callbacks = [TaskCheckpoints(), GradientAccumulationScheduler(scheduling)]
        return fits.fit(FineTuning(Identity(FEATURES), torch.nn.Linear), tmp_path / name,
                        resume=resume, callbacks=callbacks)  # fmt: skip

    steps = fit("whole", {1: 2}).global_step
    checkpoint = tmp_path / "whole" / "checkpoints" / "task_2.ckpt"  # when it was 2 already
    assert fit("same", {1: 2}, checkpoint).global_step == steps
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=\{1: 2, 0: 1\} .* \{1: 3, 0: 1\}"):
        fit("other", {1: 3}, checkpoint)


def test_a_checkpoint_that_lacks_an_option_of_the_trainer_is_refused(tmp_path: Path) -> None:
    fits.fit(FineTuning(Identity(FEATURES), torch.nn.Linear), tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoints" / "task_1.ckpt"
    content = torch.load(path, weights_only=True)
    del content["trainer_options"]["accumulate_grad_batches"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"began with trainer\.accumulate_grad_batches=None and is to go on with 1"):
        fits.fit(FineTuning(Identity(FEATURES), torch.nn.Linear), tmp_path / "again", resume=path)


def test_a_saved_configuration_of_a_resumed_run_begins_anew(finished: Path, tiny_config: Path, tmp_path: Path) -> None:
    assert go_on(tiny_config, tmp_path / "runs", tmp_path / "log") == 0
    assert yaml.safe_load((finished / "config.yaml").read_text())["ckpt_path"] is None


def test_augmentation_does_not_depend_on_what_came_before(tmp_path: Path) -> None:
    """Nor on the number of workers."""
    name = next(iter(CONFIGURATIONS))
    run = Interrupted(name, tmp_path)
    assert run._call("two", "--data.init_args.num_workers", "0") == 0
    assert results_of(run.whole) == results_of(tmp_path / "two" / "killed" / "version_0")
    assert (run.whole / "metrics.csv").read_bytes() == (tmp_path / "two/killed/version_0/metrics.csv").read_bytes()


class Fails(Callback):
    """Ends a run with an error before a step is taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("failed on purpose")


def fit_with_dropout(folder: Path, ranks: int, resume: Path | None = None, fails: int = -1) -> dict[str, torch.Tensor]:
    """The state in the end, or after the failure."""

    def head(features: int, classes: int) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Dropout(0.3), MHLinear.published(features, classes, key_mem_units=5, delta=2)
        )

    torch.manual_seed(0)
    method = FineTuning(Identity(FEATURES), head)
    how: dict[str, Any] = {} if ranks == 1 else {"strategy": DDPStrategy(process_group_backend="gloo")}
    with suppress(RuntimeError):
        callbacks = [TaskCheckpoints(minutes=0), Fails(fails)]
        fits.fit(method, folder, resume=resume, devices=ranks, callbacks=callbacks, **how)
    return {name: value.clone() for name, value in method.state_dict().items()}


def work(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    whole = fit_with_dropout(folder / "whole", 2)
    stopped = fit_with_dropout(folder / "stopped", 2, fails=8)
    resumed = fit_with_dropout(folder / "resumed", 2, resume=folder / "stopped" / "checkpoints" / "last.ckpt")
    return [whole, stopped, resumed]


def test_two_ranks_go_on_as_two_and_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    for whole, stopped, resumed in fits.on_two_ranks(work, tmp_path):
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
        assert not torch.equal(whole["head.1.M"], stopped["head.1.M"])
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="the checkpoint is of 2 processes and this run has 1"):
        alone = fit_with_dropout(tmp_path / "alone", 1, resume=last)
    assert torch.equal(alone["head.1.key_counter"].sum(), whole["head.1.key_counter"].sum())
