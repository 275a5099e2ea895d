"""What the data sets of published class-incremental experiments have in common."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from mh_lightning import data
from mh_lightning.data import archives
from mh_lightning.data.archived_images import ArchivedImages
from mh_lightning.data.transforms import ImageTransforms
from tests.data.packed import images_of, tar_of, write_files, zip_of
from tests.data.refusal import refused, refused_stream
from tests.data.test_cifar import write as write_cifar
from tests.data.test_domainnet import write as write_sketches

TRANSFORMS = {
    data.CIFAR10: "jittered_random_resized_crop",
    data.CIFAR100: "jittered_random_resized_crop",
    data.CUB200: "random_crop",
    data.Cars196: "random_crop",
    data.DomainNetSketch: "random_crop",
    data.ImageNet100: "jittered_random_resized_crop",
    data.ImageNet1000: "jittered_random_resized_crop",
    data.ImageNetR: "random_resized_crop",
    data.RESISC45: "random_crop",
}
each = pytest.mark.parametrize("kind", TRANSFORMS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of images."""
    write_files(tmp_path, images_of({"cat": 3, "ant": 2}, "train/"))
    return write_files(tmp_path, images_of({"cat": 1, "ant": 1}, "test/"))


@each
def test_folders_of_images_come_first(kind: type[ArchivedImages], root: Path) -> None:
    for names in kind.archives.values():
        for name in names:
            (root / name).write_bytes(b"not looked at")
    stream = kind(root=str(root), increment=1)
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == ["ant", "cat"]
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1] and splits.test.labels.tolist() == [0, 1]
    assert splits.test.inputs == [str(root / "test" / name / "0.jpg") for name in ("ant", "cat")]
    stream.setup("fit")
    assert [stream.num_samples("train", task) for task in range(2)] == [2, 3]


@each
def test_image_transforms(kind: type[ArchivedImages]) -> None:
    assert kind(root="data").image_transforms == TRANSFORMS[kind] in get_args(ImageTransforms)
    assert kind(root="data", image_transforms="backbone").image_transforms == "backbone"
    refused(lambda: kind(root="data", image_transforms="crop"), "data.image_transforms", "'crop'")


@each
def test_folders_that_do_not_fit(kind: type[ArchivedImages], root: Path) -> None:
    write_files(root, {"train/bee/0.jpg": b"no image"})
    refused_stream(kind(root=str(root)), f"data.root='{root}'", "'bee' is in train only")
    write_files(root, {"test/bee/0.jpg": b"no image"})
    refused_stream(kind(root=str(root), check_images=True), "data.root", "bee/0.jpg", "cannot be read")
    for path in (root / "test").rglob("*.jpg"):
        path.unlink()
    refused_stream(kind(root=str(root)), "data.root", str(root / "test" / "ant"), "holds no image")
    (root / "test").rename(root / "val")
    refused_stream(kind(root=str(root)), "data.root", str(root / "test"), "does not exist", kind.official)


@each
@pytest.mark.parametrize("exists", [True, False])
def test_nothing_there(kind: type[ArchivedImages], exists: bool, tmp_path: Path) -> None:
    root = tmp_path / "set"
    if exists:
        root.mkdir()
    stream = kind(root=str(root))
    stream.prepare_data()
    refused_stream(stream, f"data.root='{root}'", kind.official, "root/train/<class>/ and root/test/<class>/")


UNPACKED = [(kind, folder, name) for kind in TRANSFORMS if "CIFAR" not in kind.__name__ and "ImageNet1" not in
            kind.__name__ for folder, names in kind.archives.items() for name in names]  # fmt: skip


@pytest.mark.parametrize(("kind", "folder", "name"), UNPACKED)
def test_damaged_archive(kind: type[ArchivedImages], folder: str, name: str, tmp_path: Path) -> None:
    content = (zip_of if name.endswith(".zip") else tar_of)({f"{folder}/a/1.jpg": b"image" * 400})
    (tmp_path / name).write_bytes(content[:1000])
    refused(kind(root=str(tmp_path)).prepare_data, "data.root", name, "damaged")
    assert not (tmp_path / folder).exists()


def test_unpacks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sketches(tmp_path).load()
    monkeypatch.setattr(archives, "_files", None)
    write_sketches(tmp_path).load()


CONFIG = """
seed_everything: 1
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone: {{class_path: mh_lightning.backbones.TimmBackbone, init_args: {{name: test_vit, image_size: 32}}}}
    head: {{class_path: mh_lightning.MHLinear, init_args: {{key_mem_units: 8, delta: 2}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data:
  class_path: mh_lightning.data.{name}
  init_args: {{root: {root}, increment: 1, batch_size: 2, augment: true}}
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""


@pytest.mark.parametrize("name", ["CIFAR100", "DomainNetSketch"])
def test_command_line(name: str, run: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "archives"
    root.mkdir()
    if name == "CIFAR100":
        write_cifar(root, data.CIFAR100, packed=True)
    else:
        write_sketches(root)
    config = tmp_path / "published.yaml"
    config.write_text(CONFIG.format(name=name, root=root))
    results = json.loads((run("fit", config) / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == results["num_tasks"] == 3


def test_command_line_refuses(refuses: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "published.yaml"
    config.write_text(CONFIG.format(name="CUB200", root=tmp_path))
    assert f"data.root='{tmp_path}' lacks CUB_200_2011; it must hold CUB_200_2011.tgz" in refuses("fit", config)


def test_normalization_is_the_published_one(tmp_path: Path) -> None:
    assert data.CIFAR100.published_normalization.mean == (0.5071, 0.4867, 0.4408)
    assert data.CIFAR10.published_normalization.std == (0.2023, 0.1994, 0.2010)
    assert data.CUB200.published_normalization.mean == (0.485, 0.456, 0.406)
    assert data.FashionMNIST.published_normalization is None
