"""Every shipped configuration runs, on a few tiny samples."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mh_lightning.cli import resolved_configuration
from tests.fashion_mnist import write_fashion_mnist

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator",
         "cpu", "--model.init_args.backbone.init_args.image_size", "32")  # fmt: skip
FEW = ("--data.init_args.max_train_samples", "40", "--data.init_args.max_test_samples", "20")


def write_images(root: Path) -> None:
    """Three classes of noise."""
    generator = np.random.default_rng(0)
    for split, samples in (("train", 6), ("test", 3)):
        for name in ("apple", "pear", "plum"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(samples):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def write_mini_imagenet(root: Path) -> None:
    """The three archives, with two classes of ten images each."""
    generator = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        images = generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        content = {"image_data": images, "class_dict": {f"{part}{label}": [*range(10 * label, 10 * label + 10)]
                                                        for label in (0, 1)}}  # fmt: skip
        (root / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(content))


def each_once(configs: Sequence[Path], streams: Sequence[str], fast: int = 1) -> list[Any]:
    """Fits of some configurations, by which each method and each stream is run once; those of one in `fast` methods
    are in the fast suite. All pairs are resolved by `test_every_configuration_is_understood`: model and data are
    sections of their own, which only the number of features and of classes connects.
    """
    names = {config: next(stream for stream in streams if config.stem.startswith(f"{stream}_")) for config in configs}
    methods = {config: config.stem.removeprefix(f"{stream}_") for config, stream in names.items()}
    seen: set[str] = set()
    marked = []
    for place, method in enumerate(sorted(set(methods.values()))):
        # each method on another stream, where it has one of its own
        those = [config for config in configs if methods[config] == method]
        config = those[place % len(those)]
        seen.add(names[config])
        marked.append(pytest.param(config, marks=pytest.mark.slow if place % fast else []))
    missing = [
        next(config for config in configs if names[config] == stream) for stream in streams if stream not in seen
    ]
    return [*marked, *(pytest.param(config, marks=pytest.mark.slow) for config in missing)]


@pytest.mark.parametrize("part", range(8))
def test_every_configuration_is_understood(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    whole = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "model:" in path.read_text()]
    assert len(whole) > 200
    for path in whole[part::8]:
        configuration = resolved_configuration(["--config", str(path)])
        assert configuration["model"]["class_path"] and configuration["data"]["class_path"], path


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config(run: Callable[..., Path], tmp_path: Path, config: Path) -> None:
    options = list(SMALL)
    if config.stem == "image_folder":
        write_images(tmp_path / "images")
        options += ["--data.init_args.root", str(tmp_path / "images")]
    else:
        options += FEW
    if "_ridge_memory_head" in config.stem:
        options += ["--model.head.key_mem_units", "2"]
    folder = run("fit", config, *options)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == (3 if config.stem == "image_folder" else 5)
    assert folder.parent.name == config.stem


# mini-ImageNet's ResNet-18 would come from the network
PERTURBED: dict[str, tuple[int, tuple[str, ...]]] = {
    "digits_perturbed_cdi_memory_head": (5, ("--data.init_args.split_fractions", "[0.88, 0.02, 0.1]", *FEW)),
    "fashion_mnist_perturbed_cdi_memory_head": (5, FEW),
    "mini_imagenet_cdi_memory_head": (3, ("--model.init_args.backbone.init_args.pretrained", "false",
                                          "--data.init_args.num_workers", "0")),
}  # fmt: skip


@pytest.mark.parametrize("name", PERTURBED)
def test_config_of_perturbed_images(run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    increment, options = PERTURBED[name]
    root: tuple[str, ...] = ()
    if not name.startswith("digits"):
        (write_mini_imagenet if name.startswith("mini") else write_fashion_mnist)(tmp_path)
        root = ("--data.init_args.root", str(tmp_path))
    folder = run(
        "fit", CONFIGS / "ocdi" / f"{name}.yaml", *SMALL, *options, *root, "--data.init_args.increment", str(increment)
    )
    results = json.loads((folder / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == len(results["accuracy_matrix"][0]) == results["num_tasks"] == 6
    assert len(results["validation"]["accuracy_matrix"][0]) == 3


FROZEN = sorted(path for path in (CONFIGS / "frozen").glob("*.yaml") if path.stem.startswith(("digits", "fashion")))
FROZEN_STREAMS = (
    "digits_perturbed_cdi",
    "digits",
    "fashion_mnist_perturbed_cdi",
    "fashion_mnist_full",
    "fashion_mnist",
)
PLANE_STREAMS = [f"{name}_{order}" for name in ("modes", "moons") for order in ("iid", "ci", "cdi", "cdid")]


def test_every_frozen_method_has_a_configuration() -> None:
    methods = ("ncm", "slda", "ranpac", "ranpac_2875", "fecam", "joint", "er", "memory_head", "ridge_memory_head",
               "ridge_memory_head_projections")  # fmt: skip
    streams = ("fashion_mnist", "fashion_mnist_full", "fashion_mnist_perturbed_cdi", "digits", "digits_perturbed_cdi")
    names = {path.stem for path in FROZEN}
    assert names >= {f"{stream}_{method}" for stream in streams for method in methods} | {"fashion_mnist_linear"}


@pytest.mark.parametrize("config", each_once(FROZEN, FROZEN_STREAMS, 3), ids=lambda path: path.stem)
def test_config_of_kept_features(run: Callable[..., Path], fashion_mnist: Path, config: Path) -> None:
    options = ["--data.init_args.feature_cache.folder", str(fashion_mnist / "features"), "--pictures", "false"]
    if config.stem.startswith("fashion"):
        options += ["--data.init_args.root", str(fashion_mnist)]
    perturbed = "perturbed" in config.stem
    if perturbed:
        options += ["--data.init_args.increment", "5"]
        if config.stem.startswith("digits"):
            options += ["--data.init_args.split_fractions", "[0.88, 0.02, 0.1]"]
    if "_ranpac" in config.stem:
        options += ["--model.head.num_projections", "40"]
    if "_ridge_memory_head" in config.stem:
        options += ["--model.head.key_mem_units", "2"]
        if config.stem != "digits_ridge_memory_head":  # to choose the ridges takes seconds
            options += ["--model.head.ridge", "0.3"]
    if config.stem.endswith("_projections"):
        options += ["--model.head.projections_beside", "40"]
    if config.stem.endswith("er"):
        options += ["--model.init_args.buffer_size", "20"]
    solved_once = config.stem.endswith("fecam") and config.stem != "fashion_mnist_fecam"  # solutions take seconds
    if solved_once:
        options += ["--data.init_args.evaluate_every_n_tasks", "6"]
    folder = run("fit", config, *SMALL, *FEW, *options)
    results = json.loads((folder / "results.json").read_text())
    assert results["num_tasks"] == (6 if perturbed else 5)
    assert len(results["accuracy_matrix"]) == (1 if solved_once else results["num_tasks"])
    assert results["cost"]["state_bytes"] > 0 and results["cost"]["samples_per_second"] > 0
    assert len(list((fashion_mnist / "features").iterdir())) == 1


PLANES = sorted(path for part in ("ocdi", "frozen") for path in (CONFIGS / part).glob("mo*_*.yaml"))
TINY_PLANE = ("--data.init_args.num_samples", "60", "--pictures", "false", "--trainer.enable_checkpointing", "false",
              "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
              "--trainer.accelerator", "cpu")  # fmt: skip


def test_every_plane_has_every_method() -> None:
    methods = [
        {path.stem.removeprefix(f"{stream}_") for path in PLANES if path.stem.startswith(f"{stream}_")}
        for stream in PLANE_STREAMS
    ]
    assert len(set(map(frozenset, methods))) == 1 and len(methods[0]) == 16
    assert methods[0] >= {"ridge_memory_head", "ncm", "slda", "ranpac", "fecam"}


@pytest.mark.parametrize("config", each_once(PLANES, PLANE_STREAMS), ids=lambda path: path.stem)
def test_config_of_a_plane(run: Callable[..., Path], config: Path) -> None:
    folder = run("fit", config, *TINY_PLANE)
    results = json.loads((folder / "results.json").read_text())
    tasks = {"iid": 1, "ci": 4, "cdi": 8, "cdid": 8}[config.stem.split("_")[1]]
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == tasks
    assert len(results["validation"]["accuracy_matrix"][0]) == max(1, tasks // 2)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["class_path"] and saved["model"]["init_args"]["backbone"]["class_path"]  # in one file


HERE = sorted(path for path in (CONFIGS / "ci").glob("*.yaml") if path.stem.startswith(("digits", "fashion_mnist")))


def test_every_class_incremental_variant_has_a_configuration() -> None:
    heads = {"linear", "linear_aligned", "memory_head", "memory_head_aligned"}
    for data in ("digits", "fashion_mnist"):
        names = {path.stem.removeprefix(f"{data}_") for path in HERE if path.stem.startswith(data)}
        assert names >= {f"{mode}_{head}" for mode in ("frozen", "tuned") for head in heads} | {
            "tuned_linear_sequential"
        }


@pytest.mark.parametrize("config", each_once(HERE, ("digits", "fashion_mnist"), 4), ids=lambda path: path.stem)
def test_class_incremental_config(run: Callable[..., Path], fashion_mnist: Path, config: Path) -> None:
    options = ["--data.init_args.epochs_per_task", "1", "--pictures", "false"]
    if config.stem.startswith("fashion"):
        options += ["--data.init_args.root", str(fashion_mnist)]
    if "frozen" in config.stem:
        options += ["--data.init_args.feature_cache.folder", str(fashion_mnist / "features")]
    if config.stem.endswith("aligned"):
        options += ["--model.init_args.alignment.samples_per_class", "4"]
    folder = run("fit", config, *SMALL, *FEW, *options)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["by_task"]) == len(results["accuracy_matrix"]) == results["num_tasks"] == 5
