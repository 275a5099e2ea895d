"""Configurations of which any run can be killed anywhere, for the short test and for the soak."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import results_of, weights_of
from tests.kills import KILLED, run_in_child

AT_EACH_STEP = {"class_path": "mh_lightning.callbacks.TaskCheckpoints", "init_args": {"minutes": 0}}
HEAD = {
    "class_path": "mh_lightning.MHLinear",
    "init_args": {"key_mem_units": 6, "delta": 2, "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True,
                  "tau_alpha": 0.99, "tau_mu": 5, "tau_eta": 5, "random_memories": True},
}  # fmt: skip
DIGITS: dict[str, Any] = {
    "class_path": "mh_lightning.data.Digits",
    "init_args": {
        "increment": 4,
        "first_task_size": 2,
        "batch_size": 8,
        "max_train_samples": 120,
        "max_test_samples": 60,
    },
}
BACKBONE = "mh_lightning.backbones.TimmBackbone"
RESNET = {"class_path": BACKBONE, "init_args": {"name": "test_resnet", "image_size": 32}}
TRAINED = {"class_path": BACKBONE, "init_args": RESNET["init_args"] | {"frozen": False, "learning_rate_factor": 0.1}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "memory head, trained backbone, augmented images": {
        "model": {
            "class_path": "mh_lightning.methods.FineTuning",
            "init_args": {"backbone": TRAINED, "head": HEAD, "optimizer": SGD,
                          "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR",
                                           "init_args": {"step_size": 1}}},
        },
        "data": {"class_path": DIGITS["class_path"],
                 "init_args": DIGITS["init_args"] | {"augment": True, "epochs_per_task": 2, "num_workers": 1}},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "experience replay": {
        "model": {
            "class_path": "mh_lightning.methods.ExperienceReplay",
            "init_args": {"backbone": RESNET, "head": HEAD, "optimizer": SGD, "buffer_size": 20,
                          "replay_batch_size": 4},
        },
        "data": DIGITS,
    },
    "alignment on kept features": {
        "model": {
            "class_path": "mh_lightning.methods.SLCA",
            "init_args": {"backbone": RESNET, "head": HEAD, "optimizer": SGD,
                          "alignment": {"epochs": 2, "samples_per_class": 16, "batch_size": 16}},
        },
        "data": {"class_path": DIGITS["class_path"],
                 "init_args": DIGITS["init_args"] | {"epochs_per_task": 2, "feature_cache": {"folder": "features"}}},
    },
}  # fmt: skip


class Interrupted:
    """A configuration, what an uninterrupted run of it ends with, and a run that may be killed.

    Args:
        name: of `CONFIGURATIONS`.
        folder: for all files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        configuration = dict(CONFIGURATIONS[name])
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        configuration["trainer"] = trainer | configuration.get("trainer", {}) | {"callbacks": [AT_EACH_STEP]}
        config = folder / "killed.yaml"
        config.write_text(yaml.safe_dump({"seed_everything": 1, **configuration}))
        self.arguments = ["fit", "--config", str(config)]
        if "feature_cache" in configuration["data"]["init_args"]:
            self.arguments.append(f"--data.init_args.feature_cache.folder={folder / 'features'}")
        begun = time.monotonic()
        assert self._call("whole") == 0, (folder / "whole.log").read_text()
        self.seconds = time.monotonic() - begun
        self.whole, self.killed = (folder / name / "killed" / "version_0" for name in ("whole", "killed"))
        for shard in (folder / "features").rglob("*.safetensors"):
            shard.unlink()

    def _call(self, runs: str, *options: str, **how: Any) -> int:
        arguments = [*self.arguments, "--run_dir", str(self.folder / runs), *options]
        return run_in_child(arguments, self.folder / f"{runs}.log", **how)

    def go_on(self, prepare: Callable[[], None] = lambda: None, seconds: float | None = None) -> int:
        """Exit code of the same command with ``--ckpt_path last``; see `tests.kills.run_in_child`."""
        return self._call("killed", "--ckpt_path", "last", prepare=prepare, seconds=seconds)

    def kill_at_random(self, seed: int, kills: int) -> int:
        """Kill the run at random moments until it was killed so often or has ended; how often it was killed."""
        moments = random.Random(seed)
        for done in range(kills):
            if self.go_on(seconds=moments.uniform(0.05, 1.0) * self.seconds) != KILLED:
                return done
        return kills

    def assert_equal_in_the_end(self) -> None:
        """Go on to the end, and compare all that the run leaves."""
        assert self.go_on() == 0, (self.folder / "killed.log").read_text()
        assert [path.name for path in self.killed.parent.iterdir()] == ["version_0"]
        assert results_of(self.killed) == results_of(self.whole)
        ours, theirs = weights_of(self.whole), weights_of(self.killed)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        for name in ("metrics.csv", "accuracy_over_stream.png"):
            assert (self.killed / name).read_bytes() == (self.whole / name).read_bytes(), name
        assert not list(self.killed.rglob("*.tmp"))


every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
