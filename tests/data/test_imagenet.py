"""ImageNet's archives, on tiny ones written here."""

import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mh_lightning.data import ImageNet100, ImageNet1000, archives
from mh_lightning.data import imagenet as module
from tests.data.packed import images_of, picture, tar_of, write_files
from tests.data.refusal import refused, refused_stream

# numbers of the classes are not in the order of their names, and their parents have numbers above
NUMBERS = {1: "n02", 2: "n04", 3: "n01", 4: "n03"}
PARENT = (5, "n00", 4)
TRUTH = [3, 1, 4, 2, 3, 1]
NAMES = ["n01", "n02", "n03", "n04"]
DEVKIT = "ILSVRC2012_devkit_t12"


def meta() -> bytes:
    rows = [*((number, name, 0) for number, name in NUMBERS.items()), PARENT]
    file = io.BytesIO()
    names = ("ILSVRC2012_ID", "WNID", "num_children")
    savemat(file, {"synsets": np.array(rows, dtype=[(name, object) for name in names]).reshape(-1, 1)})
    return file.getvalue()


def write(root: Path, **changed: bytes | None) -> Path:
    """The three archives, with some of their contents or themselves changed or left out."""
    validation = {f"ILSVRC2012_val_{place:08d}.JPEG": picture(place) for place in range(1, len(TRUTH) + 1)}
    devkit = {"meta.mat": meta(), "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode()}
    files = {name: content for name, content in (devkit | changed).items() if content is not None}
    packed = {
        "ILSVRC2012_img_train.tar": tar_of(
            {f"{name}.tar": tar_of({f"{name}_{n}.JPEG": picture(n) for n in range(2)}) for name in NUMBERS.values()}
        ),
        "ILSVRC2012_img_val.tar": tar_of(validation),
        f"{DEVKIT}.tar.gz": tar_of({f"{DEVKIT}/data/{name}": files[name] for name in devkit if name in files}, "w:gz"),
        **{name: content for name, content in changed.items() if ".tar" in name},
    }
    return write_files(root, {name: content for name, content in packed.items() if content is not None})


def assert_reads(stream: ImageNet1000, root: Path, names: list[str]) -> None:
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == names
    folder = root / "ILSVRC2012_img_train"
    assert splits.train.inputs == [str(folder / name / f"{name}_{n}.JPEG") for name in names for n in range(2)]
    assert splits.train.labels.tolist() == np.repeat(np.arange(len(names)), 2).tolist()
    expected = [(place, NUMBERS[number]) for place, number in enumerate(TRUTH, 1) if NUMBERS[number] in names]
    folder = root / "ILSVRC2012_img_val"
    assert splits.test.inputs == [str(folder / f"ILSVRC2012_val_{place:08d}.JPEG") for place, _ in expected]
    assert [names[label] for label in splits.test.labels] == [name for _, name in expected]


@pytest.mark.parametrize("kind", [ImageNet1000, ImageNet100])
def test_reads_the_archives(kind: type[ImageNet1000], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    assert_reads(kind(str(tmp_path), check_images=True), tmp_path, NAMES)
    monkeypatch.setattr(archives, "_files", None)  # not unpacked again
    assert_reads(kind(str(tmp_path)), tmp_path, NAMES)
    for path in tmp_path.glob("*.tar*"):
        path.unlink()
    assert_reads(kind(str(tmp_path)), tmp_path, NAMES)


def test_only_the_classes_asked_for_are_unpacked(tmp_path: Path) -> None:
    write(tmp_path)
    assert_reads(ImageNet100(str(tmp_path), classes=["n04", "n01"]), tmp_path, ["n01", "n04"])
    assert {path.name for path in (tmp_path / "ILSVRC2012_img_train").iterdir()} == {"n01", "n04"}
    assert_reads(ImageNet1000(str(tmp_path)), tmp_path, NAMES)  # the others join them


def test_default_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUBSET", 2)
    write(tmp_path)
    order = np.random.RandomState(1993).permutation(4)
    assert_reads(ImageNet100(str(tmp_path)), tmp_path, sorted(NAMES[place] for place in order[:2]))


@pytest.mark.parametrize("classes", [None, ["n03", "n01"]])
def test_classes_of_folders(classes: list[str] | None, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_files(tmp_path, images_of({"n01": 1, "n02": 1, "n03": 1}, f"{split}/"))
    splits = ImageNet100(str(tmp_path), classes=classes).load()
    assert splits.class_names == (["n01", "n03"] if classes else ["n01", "n02", "n03"])
    assert [Path(path).parent.name for path in splits.test.inputs] == splits.class_names


@pytest.mark.parametrize("classes", [[], ["n01", "n07", "n09"]])
def test_unknown_classes(classes: list[str], tmp_path: Path) -> None:
    stream = ImageNet100(str(write(tmp_path)), classes=classes)
    refused(stream.prepare_data, "data.classes", "4 classes, such as n01", str(classes[1:2]))


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"ILSVRC2012_img_val.tar": None}, ("lacks ILSVRC2012_img_val", "root/train/<class>/")),
        ({"ILSVRC2012_img_train.tar": None}, ("lacks ILSVRC2012_img_train",)),
        ({f"{DEVKIT}.tar.gz": None}, (f"lacks {DEVKIT}",)),
        ({f"{DEVKIT}.tar.gz": b"damaged"}, (f"{DEVKIT}.tar.gz", "damaged")),
        ({"ILSVRC2012_img_val.tar": b"damaged"}, ("ILSVRC2012_img_val.tar", "damaged")),
        ({"ILSVRC2012_img_train.tar": tar_of({"n01.tar": tar_of({"a.JPEG": b"a"})})}, ("lacks n02.tar",)),
        ({"meta.mat": None}, ("lacks", "meta.mat")),
        ({"meta.mat": b"no table"}, ("meta.mat", "cannot be read")),
        ({"ILSVRC2012_validation_ground_truth.txt": None}, ("lacks", "ground_truth.txt")),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1 2 x"}, ("ground_truth.txt", "cannot be read")),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\n2\n3\n4\n"}, ("ground_truth.txt", "6 images", "4 numbers")),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1 2 3 4 4 9"}, ("ground_truth.txt", "from 1 to 9")),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1 2 3 3 3 3"}, ("'n03'", "no test image")),
        ({"ILSVRC2012_img_val.tar": tar_of({f"{n}.JPEG": b"" for n in range(6)})}, ("00000001.JPEG", "is not in")),
    ],
)
def test_refused(changed: dict[str, bytes | None], parts: tuple[str, ...], tmp_path: Path) -> None:
    stream = ImageNet1000(str(write(tmp_path, **changed)))

    def read() -> None:
        stream.prepare_data()
        stream.load()

    refused(read, "data.root", *parts)
    if "damaged" not in parts:
        refused_stream(stream, "data.root")
