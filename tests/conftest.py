"""What several tests need: a tiny stream in a file, and the command line on it."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mh_lightning.cli import main
from mh_lightning.metrics import CALIBRATION
from tests.fashion_mnist import write_fashion_mnist
from tests.slow import EACH, WHOLE

# tiny tensors are fastest on one thread, here and in the processes that tests start, and the reference vectors were
# recorded with one
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# autograd counts devices at its first backward pass, and where torch.compile came before it, it starts threads, with
# which processes that tests fork cannot have a backward pass
torch.ones(1, requires_grad=True).sum().backward()

CLASSES, FEATURES = 6, 16

TINY = """
seed_everything: 3
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone: {{class_path: mh_lightning.backbones.Identity, init_args: {{num_features: {features}}}}}
    head:
      class_path: mh_lightning.MHLinear
      init_args: {{key_mem_units: 8, delta: 2, upd_m: WTA, upd_k: ad_hoc_WTA, distance: euclidean, gamma_alpha: 5,
                  scramble: true, tau_alpha: 0.95, tau_mu: 5, tau_eta: 5}}
    optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.01}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 2}}}}
    reset_optimizer: true
data:
  class_path: mh_lightning.data.TensorFile
  init_args: {{path: {path}, increment: 2, epochs_per_task: 2, batch_size: 16, validation_fraction: 0.2}}
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `tests.slow` names."""
    counts: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        counts[name] += 1
        left_out = name in EACH and (counts[name] - 1) % EACH[name]
        if left_out or name in WHOLE or name.partition("::")[0] in WHOLE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_foreign_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest's own arguments stand beside those it is given."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(autouse=True)
def _no_environment_of_another_test() -> Iterator[None]:
    """Lightning's launcher leaves LOCAL_RANK and others behind, from which processes started later take their rank."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six Gaussian classes in 16 dimensions, 20 training and 5 test samples each."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)

    def split(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(CLASSES).repeat(samples)
        return centres[labels] + torch.randn(len(labels), FEATURES, generator=generator), labels

    (x_train, y_train), (x_test, y_test) = split(20), split(5)
    path = tmp_path_factory.mktemp("stream") / "tiny.safetensors"
    save_file({"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}, path)
    return path


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The idx files, and a place for features that all configurations share."""
    folder = tmp_path_factory.mktemp("fashion_mnist")
    write_fashion_mnist(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_stream: Path, tmp_path: Path) -> Path:
    """A configuration of everything at once: Memory Head, Adam, scheduler, resets, validation split."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(features=FEATURES, path=tiny_stream))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Run the command line and return its run folder."""

    def run_cli(subcommand: str, config: Path, *options: str) -> Path:
        runs = tmp_path / "runs"
        before = set(runs.rglob("version_*"))
        main([subcommand, "--config", str(config), "--run_dir", str(runs), *options])
        (folder,) = set(runs.rglob("version_*")) - before
        return folder

    return run_cli


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run the command line, expect exit code 2, and return the one sentence on standard error."""

    def run_cli(subcommand: str, config: Path, *options: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([subcommand, "--config", str(config), "--run_dir", str(tmp_path / "refused"), *options])
        assert exit_info.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert not list((tmp_path / "refused").rglob("results.json"))
        return errors[0]

    return run_cli


class Close(float):
    """A number that is rounded otherwise in batches of other sizes, or by other ranks."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-5, abs_tol=1e-7)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


def results_of(folder: Path) -> dict[str, Any]:
    """results.json of a run, without what may differ between equal runs; its calibration is equal up to rounding."""

    def with_close(part: dict[str, Any]) -> dict[str, Any]:
        return part | {name: Close(part[name]) for name in CALIBRATION if name in part}

    results: dict[str, Any] = json.loads((folder / "results.json").read_text(), object_hook=with_close)
    del results["seconds"], results["cost"]
    return results


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return weights
