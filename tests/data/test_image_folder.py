"""Image folders, on tiny files written here."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from mh_lightning.data import ImageFolder, ImageNetR
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


def listed(root: Path, caplog: pytest.LogCaptureFixture) -> tuple[dict[str, list[str]], str]:
    """The training images of each class, by their paths in its folder, and the only sentence on what was left out."""
    caplog.clear()
    with caplog.at_level("INFO"):
        splits = ImageFolder(str(root), check_images=False).load()
    found: dict[str, list[str]] = {name: [] for name in splits.class_names}
    for path, label in zip(splits.train.inputs, splits.train.labels, strict=True):
        name = splits.class_names[label]
        found[name].append(str(Path(path).relative_to(root / "train" / name)))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1
    return found, told[0]


def test_hidden_names_are_left_out_at_every_level(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that is added holds images; a notes.txt is in each of four class folders, and train/.hidden is there."""
    expected, told = listed(root, caplog)
    assert expected == {"ant": ["a.png", "more/b.JPG"], "cat": ["a.png", "more/b.JPG"]}
    assert "1 hidden" in told and "4 without the suffix of an image" in told and "linking" not in told
    for place in ("", "train", "train/cat", "train/cat/more", "test/ant"):
        (root / place / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
        (root / place / ".ipynb_checkpoints" / "deep" / "a.png").write_bytes(PNG)
        (root / place / "._x.png").write_bytes(PNG)
    (root / "train" / "loose.png").write_bytes(PNG)
    (root / "val" / "cat").mkdir(parents=True)
    found, told = listed(root, caplog)
    assert found == expected
    for part in ("9 hidden", "._x.png'", "1 in no class folder", "loose.png'", "1 beside train and test", "val'"):
        assert part in told
    stream = ImageFolder(str(root), increment=2)
    stream.setup("fit")
    assert stream.num_samples("train", 0) == stream.num_samples("test", 0) == 4


def test_links_are_followed_and_loops_noticed(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere" / "of" / "cats"
    elsewhere.mkdir(parents=True)
    for number in range(6):
        (elsewhere / f"{number}.png").write_bytes(PNG)
    (elsewhere / "back").symlink_to(elsewhere.parent)  # above what the link leads to
    cat = root / "train" / "cat"
    (cat / "linked").symlink_to(elsewhere)
    (cat / "again").symlink_to("more")  # a neighbour
    (cat / "self").symlink_to("self")
    (cat / "more" / "up").symlink_to(cat)
    (cat / "more" / "all").symlink_to(root)
    (root / "train" / "ant" / "one.png").symlink_to(elsewhere / "1.png")
    found, told = listed(root, caplog)
    assert found["ant"] == ["a.png", "more/b.JPG", "one.png"]
    assert found["cat"] == ["a.png", *(f"linked/{number}.png" for number in range(6)), "more/b.JPG"]
    assert "3 linking back to a folder above" in told
    assert f"1 linking to a folder that is counted already (such as {str(cat / 'again')!r})" in told


def test_what_links_lead_to_is_counted_once(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    for name in ("1.png", "below/2.png"):
        (elsewhere / name).write_bytes(PNG)
    cat = root / "train" / "cat"
    (cat / "first").symlink_to(elsewhere / "below")
    (cat / "second").symlink_to(elsewhere)
    (cat / "third").symlink_to(elsewhere)
    found, told = listed(root, caplog)
    assert found["cat"] == ["a.png", "first/2.png", "more/b.JPG", "second/1.png"]
    assert "2 linking to a folder that is counted already" in told  # second/below and third


@pytest.mark.parametrize("kind", ["to another class", "to the same folder", "to a folder of another's", "whole class"])
def test_links_that_give_images_two_classes_are_refused(kind: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    (tmp_path / "elsewhere" / "below" / "1.png").write_bytes(PNG)
    ant, cat = root / "train" / "ant", root / "train" / "cat"
    if kind == "to another class":
        (ant / "linked").symlink_to(cat)
    elif kind == "whole class":
        shutil.rmtree(cat)
        cat.symlink_to("ant")
    else:
        (ant / "linked").symlink_to(tmp_path / "elsewhere")
        (cat / "linked").symlink_to(tmp_path / "elsewhere" / ("below" if kind == "to a folder of another's" else ""))
    refused_stream(ImageFolder(str(root)), "data.root", f"'{ant}", f"'{cat}", "one folder", "two classes", "remove")


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "more":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    refused_stream(ImageFolder(str(root)), "data.root", f"'{root / 'train' / 'ant' / 'more'}'", "Permission denied")


def test_reading_options(root: Path) -> None:
    """The first test image of each class is transparent, the second lies on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("ant", "cat"):
        Image.new("RGBA", (24, 32)).save(root / "test" / name / "a.png")
        Image.new("RGB", (32, 24)).save(root / "test" / name / "more" / "b.JPG", exif=exif)
    stream = ImageFolder(str(root))
    stream.setup("fit")
    x, *_ = next(iter(stream.test_dataloader()[0]))
    assert x.shape == (4, 3, 32, 24) and (x[[0, 2]] == 1).all() and (x[[1, 3]] == 0).all()
    stream = ImageFolder(str(root), ground="#000000", upright=False)
    stream.setup("fit")
    dataset = stream.test_dataloader()[0].dataset
    assert (dataset[0][0] == 0).all() and dataset[1][0].shape == (3, 24, 32)
    refused(lambda: ImageFolder(str(root), ground="whitish"), "data.ground", "'whitish'")


def test_published_data_sets_are_read_as_published(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("ant", "cat"):
        for number in range(10):
            (tmp_path / "imagenet-r" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40)).save(tmp_path / "imagenet-r" / name / f"{number}.jpg", exif=exif)
    stream = ImageNetR(root=str(tmp_path), increment=1)
    stream.setup("fit")
    assert stream.test_dataloader()[0].dataset[0][0].shape == (3, 40, 60)


@pytest.mark.parametrize("option", [{"ground": "black"}, {"upright": False}])
def test_reading_options_are_those_of_the_checkpoint(option: dict[str, Any], root: Path) -> None:
    stream, other = ImageFolder(str(root)), ImageFolder(str(root), **option)
    stream.setup("fit")
    other.setup("fit")
    stream.load_state_dict(stream.state_dict())
    refused(lambda: other.load_state_dict(stream.state_dict()), "ckpt_path", f"with {next(iter(option))} ")


def test_numbers_without_a_range_are_named_before_training(root: Path) -> None:
    path = root / "train" / "cat" / "float.tif"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    refused_stream(ImageFolder(str(root)), "data.root", f"'{path}'", "range", "mode F")


def test_further_frames_are_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 90, 200)]
    for name in ("pages.tif", "moving.png", "moving.webp"):
        frames[0].save(root / "train" / "cat" / name, save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(root / "train" / "cat" / "preview.jpg", "MPO", save_all=True, append_images=frames[1:])
    stream = ImageFolder(str(root))
    with caplog.at_level("INFO"):
        stream.setup("fit")
    told = [record.getMessage() for record in caplog.records if "frames or pages" in record.getMessage()]
    assert len(told) == 1 and "of 3 image files with several frames" in told[0] and "moving.png'" in told[0]
    read = stream.unaugmented_train_dataloader(1).dataset
    of_path = dict(zip(read.samples.inputs, read, strict=True))
    for name in ("pages.tif", "moving.png", "moving.webp"):
        x = of_path[str(root / "train" / "cat" / name)][0]
        assert ((x[0] * 255).round() == 10).all()
