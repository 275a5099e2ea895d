"""Stanford Cars' archives and annotations, on tiny ones written here."""

import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mh_lightning.data import Cars196
from tests.data.packed import picture, tar_of
from tests.data.refusal import refused, refused_stream

NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
TRAIN, TEST = [3, 1, 2, 2], [2, 3, 1]


def mat(**content: object) -> bytes:
    file = io.BytesIO()
    savemat(file, content)
    return file.getvalue()


def annotations(labels: list[int], first: int = 1) -> bytes:
    """A table as in the devkit: a box, the class from 1, and the name of the file."""
    rows = [(39, 116, 569, 375, label, f"{number:05d}.jpg") for number, label in enumerate(labels, first)]
    names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    return mat(annotations=np.array(rows, dtype=[(name, object) for name in names]))


def write(root: Path, labels_in_devkit: bool = False, **changed: bytes | None) -> Cars196:
    """All files, with some of the annotations changed or left out."""
    for split, labels in (("train", TRAIN), ("test", TEST)):
        images = {f"cars_{split}/{number:05d}.jpg": picture(number) for number in range(1, len(labels) + 1)}
        (root / f"cars_{split}.tgz").write_bytes(tar_of(images, "w:gz"))
    tables = {
        "cars_meta": mat(class_names=np.array([NAMES], dtype=object)),
        "cars_train_annos": annotations(TRAIN),
        "cars_test_annos": mat(annotations=3),  # without classes
        "cars_test_annos_withlabels": annotations(TEST),
        **changed,
    }
    devkit = {"devkit/README.txt": b""}
    for name, content in tables.items():
        if content is None:
            continue
        if name.endswith("withlabels") and not labels_in_devkit:
            (root / f"{name}.mat").write_bytes(content)
        else:
            devkit[f"devkit/{name}.mat"] = content
    (root / "car_devkit.tgz").write_bytes(tar_of(devkit, "w:gz"))
    stream = Cars196(str(root), increment=1)
    stream.prepare_data()
    return stream


@pytest.mark.parametrize("labels_in_devkit", [False, True])
def test_reads_the_annotations(labels_in_devkit: bool, tmp_path: Path) -> None:
    splits = write(tmp_path, labels_in_devkit).load()
    assert splits.class_names == NAMES
    for part, split, labels in ((splits.train, "train", TRAIN), (splits.test, "test", TEST)):
        assert part.inputs == [str(tmp_path / f"cars_{split}" / f"{n + 1:05d}.jpg") for n in range(len(labels))]
        assert part.labels.tolist() == [label - 1 for label in labels]


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"cars_test_annos_withlabels": None}, ("lacks cars_test_annos_withlabels.mat", "root/train/<class>/")),
        ({"cars_meta": None}, ("lacks devkit/cars_meta.mat",)),
        ({"cars_meta": mat(names=3)}, ("cars_meta.mat", "holds no class_names")),
        ({"cars_meta": mat(class_names=np.array([NAMES[:2]], dtype=object))}, ("train", "none of the 2 classes")),
        ({"cars_train_annos": annotations([0, 1, 2, 3])}, ("00001.jpg", "none of the 3 classes")),
        ({"cars_train_annos": annotations(TRAIN, 2)}, ("cars_train_annos.mat", "00005.jpg", "cars_train", "is not in")),
        ({"cars_train_annos": mat(annotations=3)}, ("cars_train_annos.mat", "cannot be read")),
        ({"cars_test_annos_withlabels": annotations([2, 2, 1])}, (NAMES[2], "no test image")),
        ({"cars_test_annos_withlabels": annotations([2])}, (NAMES[0], "no test image")),
    ],
)
def test_refused(changed: dict[str, bytes | None], parts: tuple[str, ...], tmp_path: Path) -> None:
    refused_stream(write(tmp_path, **changed), "data.root", *parts)


def test_damaged_annotations(tmp_path: Path) -> None:
    stream = write(tmp_path)
    path = tmp_path / "devkit" / "cars_train_annos.mat"
    content = path.read_bytes()
    for length in range(0, len(content) - 8, 50):
        path.write_bytes(content[:length])
        refused_stream(stream, "data.root", str(path), "cannot be read")


@pytest.mark.parametrize("name", ["cars_train.tgz", "cars_test.tgz", "car_devkit.tgz"])
def test_missing_and_damaged_archives(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    for other in source.iterdir():
        if other.is_file() and other.name != name:
            (tmp_path / other.name).write_bytes(other.read_bytes())
    stream = Cars196(str(tmp_path))
    stream.prepare_data()
    refused_stream(stream, f"data.root='{tmp_path}' lacks", name)
    (tmp_path / name).write_bytes((source / name).read_bytes()[:100])
    refused(stream.prepare_data, "data.root", name, "damaged")
