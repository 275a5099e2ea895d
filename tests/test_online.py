"""Online streams and rivals as a user runs them: chunks, resuming, two processes, pictures."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.conftest import results_of, weights_of

Run = Callable[..., Path]
Refuses = Callable[..., str]

BUFFER: dict[str, Any] = {"buffer_size": 12, "replay_batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "FineTuning": {},
    "ExperienceReplay": BUFFER | {"replacement": "random"},
    "MaximallyInterferedRetrieval": BUFFER | {"candidates": 8},
    "AveragedGEM": BUFFER,
    "GDumb": BUFFER | {"epochs": 2},
    "JointTraining": {"epochs": 2},
    "Ensemble": {"members": 2},
    "EWC": {"fisher_samples": 20},
    "SynapticIntelligence": {},
    "LwF": {},
    "DERPlusPlus": BUFFER,
    "ICaRL": BUFFER,
    "WeightAligning": BUFFER,
}
NO_PICTURES = ("--pictures", "false")
every_method = pytest.mark.parametrize("method", METHODS)


def use(config: Path, method: str, **data: Any) -> Path:
    """The tiny configuration with another method and other options of the data module."""
    settings = yaml.safe_load(config.read_text())
    settings["model"]["class_path"] = f"mh_lightning.methods.{method}"
    settings["model"]["init_args"] |= METHODS[method]
    settings["data"]["init_args"] |= data
    if method in ("GDumb", "JointTraining"):
        settings["model"]["init_args"].pop("lr_scheduler")
    config.write_text(yaml.safe_dump(settings))
    return config


def without_scheduler(config: Path, **optimizer: Any) -> None:
    """A scheduler watches the optimizer's steps, and would hide the bare ones."""
    settings = yaml.safe_load(config.read_text())
    settings["model"]["init_args"].pop("lr_scheduler", None)
    settings["model"]["init_args"]["optimizer"]["init_args"] |= optimizer
    config.write_text(yaml.safe_dump(settings))


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=tolerance if value.is_floating_point() else 0)
    if not tolerance:
        assert results_of(one) == results_of(other)


@every_method
@pytest.mark.parametrize("batch_size", [1, 4])
def test_chunks_equal_one_step_a_batch(run: Run, tiny_config: Path, method: str, batch_size: int) -> None:
    config = use(tiny_config, method, batch_size=batch_size)
    if batch_size == 1:
        without_scheduler(config, fused=True)
    steps = run("fit", config, *NO_PICTURES)
    chunks = run("fit", config, *NO_PICTURES, "--data.init_args.chunk_size", "12")
    assert_same(steps, chunks)
    if method not in ("GDumb", "JointTraining"):
        counted = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
                   for folder in (steps, chunks)]  # fmt: skip
        assert counted[0] == counted[1] == 3 * 2 * 32 // batch_size


@every_method
def test_resumed_equals_uninterrupted(run: Run, tiny_config: Path, method: str) -> None:
    config = use(tiny_config, method, batch_size=4, chunk_size=16)
    whole = run("fit", config)
    assert_same(whole, run("fit", config, "--ckpt_path", str(whole / "checkpoints" / "task_2.ckpt")))
    pictures = [(folder / "accuracy_over_stream.png").read_bytes() for folder in (whole, max(whole.parent.iterdir()))]
    assert pictures[0] == pictures[1]


def test_chunks_with_plain_gradient_descent(run: Run, tiny_config: Path) -> None:
    without_scheduler(use(tiny_config, "FineTuning", batch_size=2))
    plain = (*NO_PICTURES, "--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.5")
    assert_same(run("fit", tiny_config, *plain), run("fit", tiny_config, *plain, "--data.init_args.chunk_size", "8"))


def test_hooks_of_an_optimizer_are_called_in_chunks(run: Run, tiny_config: Path) -> None:
    without_scheduler(use(tiny_config, "FineTuning", batch_size=8, chunk_size=32))
    calls: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        run("fit", tiny_config, *NO_PICTURES)
    finally:
        handle.remove()
    assert len(calls) == 3 * 2 * 4


TWO_PROCESSES = """
import sys
from mh_lightning.cli import main
sys.argv, (runs, config) = sys.argv[:1], sys.argv[1:]
main(["fit", "--config", config, "--run_dir", runs, "--trainer.devices", "2", "--trainer.strategy", "ddp",
      "--trainer.precision", "64-true"])
"""


def test_two_processes_equal_one(run: Run, modes: Path, tmp_path: Path) -> None:
    """Of a plane, of which pictures are drawn; tests/methods/test_ranks.py has the methods."""
    script, config = tmp_path / "two_processes.py", use(modes, "FineTuning", batch_size=2, chunk_size=None)
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               str(tmp_path / "two"), str(config)]  # fmt: skip
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    alone = run("fit", config, *NO_PICTURES, "--trainer.precision", "64-true")
    assert_same(alone, tmp_path / "two" / config.stem / "version_0", tolerance=1e-6)
    assert (tmp_path / "two" / "modes" / "version_0" / "decision_surfaces.png").exists()


MODES = """
seed_everything: 1
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone: {class_path: mh_lightning.backbones.Identity, init_args: {num_features: 2}}
    head: {class_path: mh_lightning.MHLinear, init_args: {key_mem_units: 10, delta: 2, distance: euclidean,
           gamma_alpha: 25.0, upd_m: WTA, upd_k: ad_hoc_WTA, beta_k: 0.01, scramble: true, tau_alpha: 0.95, tau_mu: 50,
           tau_eta: 50}}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: mh_lightning.data.Modes
  init_args: {num_samples: 200, scenario: CDID, validation_tasks: first_half, batch_size: 1, chunk_size: 100}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def modes(tmp_path: Path) -> Path:
    path = tmp_path / "modes.yaml"
    path.write_text(MODES)
    return path


def test_pictures_of_a_plane(run: Run, modes: Path) -> None:
    folder = run("fit", modes)
    for name in ("data_preview", "decision_surfaces", "accuracy_over_stream", "accuracy_matrix"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    surfaces = events.Images("decision_surface")
    assert [event.step for event in surfaces] == list(range(1, 9))
    assert len({event.encoded_image_string for event in surfaces}) == 8
    assert {"decision_surfaces", "data_preview", "train/accuracy_over_stream"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("train/loss")][-1] == 200  # optimizer steps, not chunks


def test_validation_of_the_first_tasks_only(run: Run, modes: Path) -> None:
    results = results_of(run("fit", modes, *NO_PICTURES))
    matrix = torch.tensor(results["validation"]["accuracy_matrix"])
    assert matrix.shape == (8, 4) and torch.tensor(results["accuracy_matrix"]).shape == (8, 8)
    assert results["validation"]["average_accuracy"] == pytest.approx(matrix[-1].mean().item())
    forgetting = (matrix[:-1].amax(dim=0) - matrix[-1]).mean().item()
    assert results["validation"]["forgetting"] == pytest.approx(forgetting)


def test_without_pictures(run: Run, modes: Path) -> None:
    folder = run("fit", modes, *NO_PICTURES)
    assert (folder / "results.json").exists() and not list(folder.glob("*.png"))


def test_resumed_pictures(run: Run, modes: Path) -> None:
    whole = run("fit", modes)
    resumed = run("fit", modes, "--ckpt_path", str(whole / "checkpoints" / "task_3.ckpt"))
    assert_same(whole, resumed)
    assert (whole / "decision_surfaces.png").read_bytes() == (resumed / "decision_surfaces.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--data.init_args.chunk_size", "0"), "data.chunk_size=0"),
        (("--data.init_args.batch_size", "4", "--data.init_args.chunk_size", "10"), "multiple of data.batch_size=4"),
        (("--trainer.accumulate_grad_batches", "2"), "trainer.accumulate_grad_batches=2"),
        (("--trainer.gradient_clip_val", "1.0"), "trainer.gradient_clip_val=1.0"),
        (("--trainer.max_steps", "5"), "trainer.max_steps=5"),
        (("--trainer.limit_train_batches", "0.5"), "trainer.limit_train_batches=0.5"),
        (("--trainer.limit_train_batches", "1"), "trainer.limit_train_batches=1"),
        (("--model.init_args.optimizer", "torch.optim.LBFGS"), "data.chunk_size cannot be combined with LBFGS"),
        (
            (
                "--model.init_args.lr_scheduler",
                "lightning.pytorch.cli.ReduceLROnPlateau",
                "--model.init_args.lr_scheduler.monitor",
                "train/loss",
            ),
            "cannot be combined with ReduceLROnPlateau",
        ),
        (("--trainer.precision", "bf16-mixed"), "trainer.precision=bf16-mixed"),
        (
            ("--model", "JointTraining", "--model.init_args.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR"),
            "JointTraining learns anew after each task, without a scheduler",
        ),
        (("--num_threads", "0"), "num_threads must lie in [1, 1024], got 0"),
        (("--model.init_args.loss", "square"), "loss"),
        (("--model.init_args.backbone.init_args.num_features", "3"), "num_features is 3, but the data has 2"),
        (("--data.init_args.scenario", "XY"), "scenario"),
    ],
)
def test_refusals(refuses: Refuses, modes: Path, options: tuple[str, ...], part: str) -> None:
    assert part in refuses("fit", modes, *options)


def test_an_optimizer_of_touched_units_learns_chunks(run: Run, modes: Path) -> None:
    touched = ("--model.init_args.only_touched_units", "true", *NO_PICTURES)
    assert_same(run("fit", modes, *touched), run("fit", modes, *touched, "--data.init_args.chunk_size", "null"))


def test_hinge(run: Run, modes: Path) -> None:
    plain, hinge = (run("fit", modes, "--pictures", "false", "--model.init_args.loss", loss)
                    for loss in ("cross_entropy", "hinge"))  # fmt: skip
    assert not torch.equal(weights_of(plain)["head.M"], weights_of(hinge)["head.M"])
