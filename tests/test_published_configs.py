"""The published class-incremental experiments, each run on a few tiny images with a tiny backbone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.data.packed import images_of, write_files

CONFIGS = Path(__file__).parents[1] / "configs" / "ci"
DATA_SETS = ("cifar100", "imagenet_r", "cub200", "cars196")
PUBLISHED = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem.startswith(DATA_SETS))
TINY = """
model:
  init_args:
    backbone:
      init_args: {name: test_vit, pretrained: false, checkpoint_path: null, image_size: 32}
    alignment: {samples_per_class: 8, epochs: 1}
data:
  init_args: {increment: 2, last_task_size: 1, epochs_per_task: 1, num_workers: 0}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
pictures: false
"""


@pytest.fixture(scope="session")
def five_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images of five classes."""
    root = tmp_path_factory.mktemp("five_classes")
    for split, images in (("train", 12), ("test", 3)):
        write_files(root, images_of(dict.fromkeys(("a", "b", "c", "d", "e"), images), f"{split}/"))
    return root


def test_every_published_row_has_a_configuration() -> None:
    rows = {f"{data}_{weights}_{method}" for data in DATA_SETS for weights in ("in21k", "mocov3")
            for method in ("slca", "memory_head")}  # fmt: skip
    assert {path.stem for path in PUBLISHED} == rows


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda path: path.stem)
def test_published_configuration(run: Callable[..., Path], five_classes: Path, tmp_path: Path, config: Path) -> None:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(TINY)
    folder = run("fit", config, "--config", str(tiny), "--data.init_args.root", str(five_classes))
    results = json.loads((folder / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == 3
    assert [row["classes_seen"] for row in results["by_task"]] == [2, 4, 5]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda path: path.stem)
def test_published_hyper_parameters(config: Path) -> None:
    """As listed in the brief and in SLCA's experiment files."""
    data, weights, method = config.stem.rsplit("_", 2) if config.stem.endswith("slca") else (
        *config.stem.removesuffix("_memory_head").rsplit("_", 1), "memory_head")  # fmt: skip
    content = yaml.safe_load(config.read_text())
    model, stream = content["model"]["init_args"], content["data"]["init_args"]
    epochs, milestone = (90, 80) if weights == "mocov3" else (20, 18) if data == "cifar100" else (50, 40)
    assert stream["epochs_per_task"] == epochs
    assert model["lr_scheduler"]["init_args"] == {"milestones": [milestone]}
    assert model["optimizer"]["init_args"] == {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    assert model["alignment"] == {"logit_norm": 0.05 if data == "cars196" else 0.1}
    assert stream["batch_size"] * content["trainer"]["accumulate_grad_batches"] == 128
    assert stream["increment"] == (10 if data == "cifar100" else 20) and stream["class_order_seed"] == 1993
    assert stream.get("last_task_size") == (16 if data == "cars196" else None)
    assert ("head" in model) == (method == "memory_head")
    backbone = yaml.safe_load((config.parent / model["backbone"]).read_text())["init_args"]
    assert backbone["learning_rate_factor"] == 0.01 and not backbone["frozen"]
