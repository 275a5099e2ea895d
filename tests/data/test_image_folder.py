"""Image folders, on tiny files written here."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mh_lightning.data import ImageFolder
from tests.data.refusal import refused, refused_stream


def encoded(value: int, kind: str) -> bytes:
    """An image of noise around a grey value."""
    noise = np.random.default_rng(value).integers(-20, 20, (24, 32, 3)) + value
    file = io.BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


PNG, JPEG = encoded(100, "PNG"), encoded(200, "JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, two images each in train and in test: a PNG, and a JPEG one folder further down."""
    for split in ("train", "test"):
        for name in ("cat", "ant"):
            folder = tmp_path / split / name
            (folder / "more").mkdir(parents=True)
            (folder / "a.png").write_bytes(PNG)
            (folder / "more" / "b.JPG").write_bytes(JPEG)
            (folder / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def test_lists_images_by_class(root: Path) -> None:
    splits = ImageFolder(str(root)).load()
    assert splits.class_names == ["ant", "cat"]
    for split, part in (("train", splits.train), ("test", splits.test)):
        assert part.inputs == [
            str(root / split / name / file) for name in ("ant", "cat") for file in ("a.png", "more/b.JPG")
        ]
        assert part.labels.tolist() == [0, 0, 1, 1]


def test_items(root: Path) -> None:
    stream = ImageFolder(str(root))
    stream.setup("fit")
    x, targets, tasks = next(iter(stream.test_dataloader()[0]))
    assert x.shape == (4, 3, 24, 32) and targets.tolist() == tasks.tolist() == [0, 0, 1, 1]
    png = np.array(Image.open(io.BytesIO(PNG)))
    assert torch.equal((x[0] * 255).round(), torch.from_numpy(png).permute(2, 0, 1).float())
    assert x[1].mean() * 255 == pytest.approx(200, abs=5)


def test_folders(root: Path) -> None:
    refused_stream(ImageFolder(str(root / "nowhere")), "data.root", str(root / "nowhere" / "train"), "does not exist")
    (root / "test" / "bee").mkdir()
    refused_stream(ImageFolder(str(root)), "data.root", "same classes", "'bee'")
    (root / "train" / "bee").mkdir()
    refused_stream(ImageFolder(str(root)), "data.root", str(root / "train" / "bee"), "holds no image")
    (root / "train" / "bee" / "a.png").write_bytes(PNG)
    refused_stream(ImageFolder(str(root)), "data.root", str(root / "test" / "bee"), "holds no image")
    (root / "test" / "bee" / "a.png").write_bytes(PNG)
    stream = ImageFolder(str(root))
    stream.setup("fit")
    assert stream.class_names == ["ant", "bee", "cat"]


def test_no_class_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / ".hidden").mkdir(parents=True)
        (tmp_path / split / "a.png").write_bytes(PNG)
    refused_stream(ImageFolder(str(tmp_path)), "data.root", str(tmp_path / "train"), "no class folder")
    (tmp_path / "test" / ".hidden").rmdir()
    (tmp_path / "test" / "a.png").unlink()
    (tmp_path / "test").rmdir()
    (tmp_path / "train" / "ant").mkdir()
    refused_stream(ImageFolder(str(tmp_path)), "data.root", str(tmp_path / "test"), "does not exist")


DAMAGE = {
    "no.png": b"this is text, not a picture\n",
    "empty.png": b"",
    "start.png": PNG[:20],
    "half.png": PNG[: len(PNG) // 2],
    "nearly.png": PNG[:-40],
    "start.jpg": JPEG[:20],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "nearly.jpg": JPEG[:-40],
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_image_is_named_before_training(name: str, split: str, root: Path) -> None:
    path = root / split / "cat" / name
    path.write_bytes(DAMAGE[name])
    refused_stream(ImageFolder(str(root)), "data.root", f"'{path}'", "cannot be read")


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in DAMAGE), ("half.png", 1)])
def test_damaged_image_is_named_when_read(name: str, num_workers: int, root: Path) -> None:
    path = root / "test" / "cat" / name
    path.write_bytes(DAMAGE[name])
    stream = ImageFolder(str(root), check_images=False, num_workers=num_workers)
    stream.setup("fit")
    refused(lambda: list(stream.test_dataloader()[0]), f"'{path}'", "cannot be read")


def test_what_passes_the_check_can_be_read(root: Path) -> None:
    path = root / "train" / "ant" / "a.jpg"
    for cut in range(1, 40):
        path.write_bytes(JPEG[:-cut])
        stream = ImageFolder(str(root))
        try:
            stream.setup("fit")
        except ValueError:
            continue
        assert len(next(iter(stream.train_dataloader()))[0]) == 3
