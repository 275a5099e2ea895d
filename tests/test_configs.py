"""Streams, methods and tables that come with the package: each is understood, fits the others, and runs on a little."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mh_lightning.cli import resolved_configuration
from mh_lightning.config_sets import check_together
from mh_lightning.errors import UserError
from mh_lightning.experiments.__main__ import experiments_of, parse
from mh_lightning.experiments.cells import Planned
from mh_lightning.experiments.runs import read_experiment
from tests.conftest import results_of
from tests.data.packed import images_of, write_files
from tests.data.test_domain_folder import write_domains

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
STREAMS, METHODS, TABLES = (
    sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("streams", "methods", "tables")
)  # fmt: skip
PLANES = [stream for stream in STREAMS if stream.stem.startswith(("modes_", "moons_"))]
SMALL = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator",
         "cpu", "--model.init_args.backbone.init_args.image_size", "32")  # fmt: skip
FEW = ("--data.init_args.max_train_samples", "40", "--data.init_args.max_test_samples", "20")
FEW_POINTS = ("--data.num_samples", "60", "--pictures", "false", "--trainer.enable_checkpointing", "false",
              "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
              "--trainer.accelerator", "cpu")  # fmt: skip
TINY_BACKBONE = """
model: {init_args: {backbone: {init_args: {name: test_vit, pretrained: false, checkpoint_path: null}}}}
data: {init_args: {num_workers: 0}}
"""

by_stem = pytest.mark.parametrize("config", [CONFIGS / "quickstart.yaml", *STREAMS], ids=lambda path: path.stem)


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


def planned_by(table: str) -> list[Planned]:
    """The experiments of a table."""
    return experiments_of(parse(["run", "--table", table, "--output", "unused"]).run)


def test_each_method_fits_each_stream() -> None:
    for stream, method in itertools.product(STREAMS, METHODS):
        check_together([stream, method])


@pytest.mark.parametrize("part", range(8))
def test_every_configuration_is_understood(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and data are sections of their own, so that each with one of the others stands for all pairs."""
    monkeypatch.chdir(ROOT)
    pairs = {(stream, METHODS[place]) for place, stream in enumerate(STREAMS)}
    pairs |= {
        (PLANES[place % len(PLANES)], method) for place, method in enumerate(METHODS) if method.stem not in IMAGES
    }
    for stream, method in sorted(pairs)[part::8]:
        if stream in PLANES and method.stem in IMAGES:
            continue
        found = resolved_configuration(["--config", str(stream), "--config", str(method)])
        assert found["experiment"] == f"{stream.stem}_{method.stem}"
        assert all(found[section]["class_path"].startswith("mh_lightning.") for section in ("model", "data"))


def test_a_method_without_a_stream_is_refused() -> None:
    for kind, config, said in (("methods", "ncm", "a stream, such as"), ("streams", "digits", "a method, such as")):
        with pytest.raises(UserError, match=said):
            resolved_configuration(["--config", str(CONFIGS / kind / f"{config}.yaml")])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["quickstart", "methods/memory_head"], "both say what model is; leave it out"),
        (["streams/modes_cdi", "streams/moons_cdi", "methods/mir"], "both say what data is; leave it out"),
        (["methods/slca_memory_head", "streams/cifar100"], "would take back data.batch_size"),
        (["methods/linear_per_task_sequential", "streams/digits_tuned"], "model.backbone.learning_rate_factor"),
    ],
)
def test_files_whose_options_would_mix_are_refused(files: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_together([CONFIGS / f"{file}.yaml" for file in files])


FIRST = """
model:
  init_args:
    head: {class_path: mh_lightning.layers.MLP, init_args: {hidden_features: [25]}}
    optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.9}}
trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: train/loss, patience: 7}}]}
"""


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ("model: {init_args: {optimizer: {class_path: SGD, init_args: {lr: 1}}}}", "model.optimizer.momentum of the"),
        ("model: {init_args: {head: mh_lightning.layers.MLP}}", "model.head.hidden_features of the first"),
        ("model.init_args.head: {class_path: mh_lightning.layers.MLP}", "model.head.hidden_features of the first"),
        ("model: {init_args: {head: piece.conf}}", "model.head.hidden_features of the first"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: x}}]}",
            "trainer.callbacks.0.patience",
        ),
        ("model: {init_args: {optimizer: {init_args: {lr: 1}}}}", ""),
        ("model: {init_args: {head: {class_path: mh_lightning.layers.MLP, init_args: {hidden_features: [5]}}}}", ""),
        ("a: [", "second[.]yaml' is no YAML in line 2"),
    ],
)
def test_classes_of_two_files_mix_in_no_spelling(tmp_path: Path, later: str, said: str) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(FIRST)
    second.write_text(later)
    (tmp_path / "piece.conf").write_text("class_path: mh_lightning.layers.MLP")
    if not said:
        check_together([first, second])
        return
    with pytest.raises(UserError, match=said):
        check_together([first, second])


def test_options_override_configurations_wherever_they_stand() -> None:
    words = ["--config", "streams/modes_ci.yaml", "--config", "methods/ncm.yaml"]
    for given in (["--data.batch_size", "7", *words], [*words, "--data.batch_size=7"]):
        assert resolved_configuration(given)["data"]["init_args"]["batch_size"] == 7
    with pytest.raises(UserError, match=r"the options of 'mine[.]yaml' would mix"):
        resolved_configuration([*words, "--data", "mine.yaml"])
    assert resolved_configuration([*words, "--experiment", "quickstart.yaml"])["experiment"] == "quickstart.yaml"


def test_a_file_that_is_missing_after_its_option_is_refused() -> None:
    for words in (["--config", "quickstart.yaml", "--config"], ["--config", "--data.batch_size", "7"]):
        with pytest.raises(UserError, match="expected one argument"):
            resolved_configuration(words)


def test_a_run_without_a_file_and_one_beside_a_saved_configuration_have_names(tmp_path: Path) -> None:
    whole = ["--model", "ClosedForm", "--model.head", "mh_lightning.heads.ClassMeans", "--model.backbone",
             "mh_lightning.backbones.Identity", "--model.backbone.num_features", "2", "--data", "Modes"]  # fmt: skip
    found = resolved_configuration(whole)
    assert found["experiment"] == "experiment"
    saved, change = tmp_path / "config.yaml", tmp_path / "narrow.yaml"
    saved.write_text(yaml.safe_dump(found | {"experiment": "first"}))
    change.write_text("data: {init_args: {increment: 2}}")
    both = ["--config", str(saved), "--config", str(change)]
    assert resolved_configuration(both)["experiment"] == "first_narrow"
    assert resolved_configuration([*both, "--experiment", "own"])["experiment"] == "own"
    assert resolved_configuration(["--config", str(saved)])["experiment"] == "first"


def test_a_class_keeps_its_own_defaults_whatever_comes_first() -> None:
    stream, method = ("--config", "streams/digits.yaml"), ("--config", "methods/er_ace.yaml")
    named = ("--model", "ERACE", "--model.head", "torch.nn.Linear", "--model.buffer_size=50")
    for words in ([*stream, *method], [*method, *stream], [*stream, *named], [*stream, *named[2:], *named[:2]]):
        assert resolved_configuration(words)["model"]["init_args"]["classes_in_loss"] == "batch"
    given = resolved_configuration([*stream, *method, "--model.classes_in_loss", "all"])
    assert given["model"]["init_args"]["classes_in_loss"] == "all"
    data = ["--data.epochs_per_task", "2", "--data", "CIFAR100", "--config", "methods/ncm.yaml", "--model.backbone",
            "backbones/efficientnet_lite0.yaml"]  # fmt: skip
    assert resolved_configuration(data)["data"]["init_args"]["image_transforms"] == "jittered_random_resized_crop"


def test_a_backbone_takes_the_place_of_a_stream_s() -> None:
    words = ["--config", "streams/cifar100.yaml", "--config", "methods/slca.yaml"]
    given = resolved_configuration([*words, "--model.backbone", "backbones/vit_b16_mocov3.yaml"])
    backbone = given["model"]["init_args"]["backbone"]["init_args"]
    assert resolved_configuration(words)["model"]["init_args"]["backbone"]["init_args"]["pretrained"] is True
    assert backbone["pretrained"] is False and backbone["checkpoint_path"].endswith("vit-b-300ep.pth.tar")


# they need a backbone of timm
IMAGES = {"memory_head_500_online", "linear_per_task_sequential", "fecam"}
PROMPTS = {  # for a transformer of fewer blocks, and no feature cache
    "ease": ["--model.backbone.peft", "Adapters"],
    "l2p": [],
    "dual_prompt": ["--model.general_layers", "[0]", "--model.expert_layers", "[1]"],
    "coda_prompt": ["--model.layers", "[0, 1]", "--model.components", "2"],
}
FASTER = dict.fromkeys(("ranpac", "random_feature_ridge", "kernel_discriminant"), ("num_projections", 40))
FASTER["truncated_projection"] = ("num_projections", 600)  # of which it keeps 500


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_method(run: Callable[..., Path], tmp_path: Path, method: Path) -> None:
    """Each once, on one of the streams in turn."""
    options = ["--config", str(method)]
    if (
        method.stem in {*IMAGES, *PROMPTS} or "slca" in method.stem or "per_task" in method.stem
    ):  # these need a stream of classes
        stream = CONFIGS / "streams" / ("digits_perturbed_cdi.yaml" if "online" in method.stem else "digits.yaml")
        cached = (
            "null" if "sequential" in method.stem or method.stem in PROMPTS else f"{{folder: {tmp_path / 'features'}}}"
        )
        options += [*SMALL, *FEW, "--data.feature_cache", cached, "--pictures", "false"]
        if "online" in method.stem:
            options += ["--data.split_fractions", "[0.88, 0.02, 0.1]", "--data.increment", "5"]
    else:
        stream = PLANES[METHODS.index(method) % len(PLANES)]
        options += FEW_POINTS
    if method.stem in PROMPTS:
        options += ["--model.backbone", "null", "--model.backbone", "TimmBackbone", "--model.backbone.name", "test_vit",
                    "--model.backbone.image_size", "32", *PROMPTS[method.stem]]  # fmt: skip
    if method.stem in FASTER:
        name, value = FASTER[method.stem]
        options += [f"--model.head.{name}", str(value)]
    if method.stem == "icarl":
        options += ["--model.buffer_size", "20"]
    if "slca" in method.stem or "aligned" in method.stem:
        options += ["--model.alignment.samples_per_class", "4"]
    folder = run("fit", stream, *options)
    results = json.loads((folder / "results.json").read_text())
    assert folder.parent.name == f"{stream.stem}_{method.stem}"
    assert len(results["accuracy_matrix"]) == results["num_tasks"]
    assert results["cost"]["state_bytes"] > 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["class_path"] and saved["model"]["init_args"]["backbone"]["class_path"]  # in one file


@by_stem
def test_stream(run: Callable[..., Path], tmp_path: Path, fashion_mnist: Path, config: Path) -> None:
    """Each once, with a method that is fast."""
    name = config.stem
    if config in PLANES:
        results = results_of(run("fit", config, "--config", str(CONFIGS / "methods" / "ncm.yaml"), *FEW_POINTS))
        assert results["num_tasks"] == {"iid": 1, "ci": 4, "cdi": 8, "cdid": 8}[name.split("_")[1]]
        assert len(results["validation"]["accuracy_matrix"][0]) == max(1, results["num_tasks"] // 2)
        return
    options, tasks = [*SMALL, "--pictures", "false"], 5
    if name != "quickstart":
        options += ["--config", str(CONFIGS / "methods" / f"{'linear' if 'tuned' in name else 'ncm'}.yaml")]
    if name == "image_folder":
        write_images(tmp_path / "images")
        options += ["--data.root", str(tmp_path / "images")]
        tasks = 3
    elif name.startswith("pacs"):
        write_domains(tmp_path / "pacs", ("photo", "art_painting", "cartoon", "sketch"))
        options += ["--data.root", str(tmp_path / "pacs")]
        tasks = {"pacs_di": 4, "pacs_cdi": 8}[name]
    elif name == "mini_imagenet_20x5":
        write_images(tmp_path / "images")
        options += ["--data.root", str(tmp_path / "images"), "--data.increment", "1"]
        tasks = 3
    elif name in ("cifar100", "cifar100_10x10", "cub200", "cars196", "imagenet_r"):
        for split, images in (("train", 12), ("test", 3)):
            write_files(tmp_path, images_of(dict.fromkeys(("a", "b", "c", "d", "e"), images), f"{split}/"))
        tiny = tmp_path / "tiny.yaml"
        tiny.write_text(TINY_BACKBONE)
        options += ["--config", str(tiny), "--data.root", str(tmp_path), "--data.increment", "2", "--experiment", name,
                    "--data.last_task_size", "1", "--data.epochs_per_task", "1"]  # fmt: skip
        tasks = 3
    elif name == "mini_imagenet_cdi":  # whose ResNet-18 would come from the network
        write_mini_imagenet(tmp_path)
        options += ["--data.root", str(tmp_path), "--model.backbone.pretrained", "false", "--data.num_workers", "0",
                    "--data.increment", "3"]  # fmt: skip
        tasks = 6
    else:
        options += FEW
    if name.startswith("fashion"):
        options += ["--data.root", str(fashion_mnist)]
    if "feature_cache" in config.read_text():
        options += ["--data.feature_cache.folder", str(fashion_mnist / "features")]
    if "perturbed" in name:
        options += ["--data.increment", "5"]
        tasks = 6
    if name == "digits_perturbed_cdi":
        options += ["--data.split_fractions", "[0.88, 0.02, 0.1]"]
    results = results_of(run("fit", config, *options))
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == tasks


HEADS_OF = ROOT / "docs" / "heads"
PUBLISHED = {HEADS_OF / "kernel_memory": "heads", HEADS_OF / "rivals": "heads_rivals",
             HEADS_OF / "bytes": "heads_bytes", HEADS_OF / "planes": "heads_planes",
             HEADS_OF / "bounds": "heads_bounds",
             ROOT / "docs" / "rivals": "rivals", ROOT / "docs" / "ocdi": "ocdi", ROOT / "docs" / "frozen": "frozen",
             ROOT / "docs" / "ci" / "frozen": "ci_frozen", ROOT / "docs" / "ci" / "tuned": "ci_tuned"}  # fmt: skip


def test_every_published_table_has_its_configuration() -> None:
    assert {*PUBLISHED.values(), "ci_published"} == {path.stem for path in TABLES}
    for folder, table in PUBLISHED.items():
        series = json.loads((folder / "series.json").read_text())
        shown = {name for stream in series["streams"] for name in stream["experiments"]}
        assert {one.name for one in planned_by(f"tables/{table}.yaml")} == shown, table


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_every_cell_of_a_table_is_understood(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the cells with the same overrides and kind of method; streams and methods are resolved above."""
    monkeypatch.chdir(ROOT)
    kinds = {one.overrides: one for one in planned_by(str(table))}
    for one in kinds.values():
        assert read_experiment(one).configuration["data"]["class_path"]


PUBLISHED_ROWS = planned_by("tables/ci_published.yaml")


@pytest.mark.parametrize("row", PUBLISHED_ROWS, ids=lambda row: row.name)
def test_published_hyper_parameters(row: Planned) -> None:
    """As listed in the brief and in SLCA's experiment files."""
    data = next(name for name in ("cifar100", "imagenet_r", "cub200", "cars196") if row.name.startswith(name))
    content = read_experiment(row).configuration
    model, stream = content["model"]["init_args"], content["data"]["init_args"]
    from_scratch = "mocov3" in row.name
    epochs, milestone = (90, 80) if from_scratch else (20, 18) if data == "cifar100" else (50, 40)
    assert stream["epochs_per_task"] == epochs
    assert model["lr_scheduler"]["init_args"]["milestones"] == [milestone]
    optimizer = {name: model["optimizer"]["init_args"][name] for name in ("lr", "momentum", "weight_decay")}
    assert optimizer == {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    assert model["alignment"]["logit_norm"] == (0.05 if data == "cars196" else 0.1)
    assert stream["batch_size"] * content["trainer"]["accumulate_grad_batches"] == 128
    assert stream["increment"] == (10 if data == "cifar100" else 20) and stream["class_order_seed"] == 1993
    assert stream["last_task_size"] == (16 if data == "cars196" else None)
    assert ("MHLinear" in model["head"]["class_path"]) == row.name.endswith("memory_head")
    backbone = model["backbone"]["init_args"]
    assert backbone["learning_rate_factor"] == 0.01 and not backbone["frozen"]
    assert backbone["pretrained"] is not from_scratch


def test_every_published_row_has_a_configuration() -> None:
    assert {row.name for row in PUBLISHED_ROWS} == {
        f"{data}_{weights}_{method}" for data in ("cifar100", "imagenet_r", "cub200", "cars196")
        for weights in ("in21k", "mocov3") for method in ("slca", "memory_head")
    }  # fmt: skip
