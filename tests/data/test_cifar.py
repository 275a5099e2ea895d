"""CIFAR's archives, on tiny ones written here as Python 2 wrote the official ones."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from mh_lightning.data import CIFAR10, CIFAR100
from tests.data.packed import images_of, tar_of, write_files
from tests.data.pickles import Bomb, python_2_pickle
from tests.data.refusal import refused, refused_stream

NAMES = ["apple", "bee", "cat"]
LAYOUTS: dict[type[CIFAR10], tuple[str, str, str, str, dict[str, list[int]]]] = {
    CIFAR10: (
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "labels",
        "batches.meta",
        {**{f"data_batch_{number}": [0, 2, 1] for number in range(1, 6)}, "test_batch": [2, 1, 0]},
    ),
    CIFAR100: (
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "fine_labels",
        "meta",
        {"train": [0, 1, 2, 2, 1, 0], "test": [2, 0, 1]},
    ),
}
both = pytest.mark.parametrize("kind", LAYOUTS)


def images_in(name: str, samples: int) -> NDArray[np.uint8]:
    """As they are in a batch: all red, then all green, then all blue pixels of an image."""
    return np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (samples, 3072), dtype=np.uint8)


def files_of(kind: type[CIFAR10]) -> dict[str, bytes]:
    _, _, key, meta, batches = LAYOUTS[kind]
    names_key = "label_names" if kind is CIFAR10 else "fine_label_names"
    files = {
        name: python_2_pickle({"batch_label": "some batch", "data": images_in(name, len(labels)), key: labels})
        for name, labels in batches.items()
    }
    return {**files, meta: python_2_pickle({names_key: NAMES}), "readme.html": b"<html>"}


def write(root: Path, kind: type[CIFAR10], packed: bool, **changed: bytes | None) -> CIFAR10:
    """The archive or the folder, with some files changed or left out."""
    folder, archive = LAYOUTS[kind][:2]
    files = {name: data for name, data in (files_of(kind) | changed).items() if data is not None}
    if packed:
        (root / archive).write_bytes(tar_of({f"{folder}/{name}": data for name, data in files.items()}, "w:gz"))
    else:
        write_files(root / folder, files)
    return kind(str(root), increment=1)


@both
@pytest.mark.parametrize("packed", [True, False])
def test_reads_what_was_written(kind: type[CIFAR10], packed: bool, tmp_path: Path) -> None:
    stream = write(tmp_path, kind, packed)
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == NAMES and splits.validation is None
    batches = LAYOUTS[kind][4]
    *train, test = batches
    for part, names in ((splits.train, train), (splits.test, [test])):
        assert part.labels.tolist() == [label for name in names for label in batches[name]]
        pixels = np.concatenate([images_in(name, len(batches[name])) for name in names])
        assert part.inputs.dtype == torch.uint8 and part.inputs.shape == (len(pixels), 32, 32, 3)
        for channel in range(3):
            plane = pixels[:, 1024 * channel : 1024 * (channel + 1)]
            assert np.array_equal(part.inputs[..., channel].numpy().reshape(-1, 1024), plane)
    assert stream.image_transforms == "jittered_random_resized_crop"
    stream.setup("fit")
    assert [stream.num_samples("test", task) for task in range(3)] == [1, 1, 1]


@both
def test_python_2_pickle_is_one(kind: type[CIFAR10]) -> None:
    loaded = pickle.loads(files_of(kind)[kind.files[1][0]], encoding="bytes")
    assert loaded[b"data"].shape == (3, 3072) and loaded[b"batch_label"] == b"some batch"


@both
def test_folders_of_images(kind: type[CIFAR10], tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_files(tmp_path, images_of({"cat": 2, "ant": 1}, f"{split}/"))
    stream = kind(str(tmp_path), download=True)  # nothing to fetch
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == ["ant", "cat"] and splits.train.labels.tolist() == [0, 1, 1]


def batch(**changed: object) -> bytes:
    return pickle.dumps({"data": images_in("test", 3), "fine_labels": [2, 0, 1]} | changed, 2)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"train": b""}, ("train", "cannot be read")),
        ({"train": None}, ("lacks train", "cifar-100-python.tar.gz")),
        ({"meta": None}, ("lacks meta",)),
        ({"meta": pickle.dumps({"label_names": NAMES})}, ("meta", "fine_label_names")),
        ({"meta": pickle.dumps({"fine_label_names": 3})}, ("meta", "lists no names")),
        ({"meta": pickle.dumps({"fine_label_names": [1, 2]})}, ("meta", "lists no names")),
        ({"meta": pickle.dumps({"fine_label_names": [*NAMES, "dog"]})}, ("'dog'", "no train image")),
        ({"test": batch(fine_labels=[0, 1])}, ("test", "labels of shape (2,)")),
        ({"test": batch(fine_labels=[0, 1, 1.5])}, ("test", "cannot be read")),
        ({"test": batch(fine_labels=[0, 1, 3])}, ("'cat'", "no test image")),
        ({"test": batch(data=[1, 2])}, ("test", "int64")),
        ({"test": batch(data=np.zeros((3, 3072)))}, ("test", "float64")),
        ({"test": batch(data=np.zeros((3, 784), np.uint8))}, ("test", "(3, 784)")),
        ({"test": pickle.dumps([1])}, ("test", "holds no data")),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_refused(changed: dict[str, bytes | None], parts: tuple[str, ...], packed: bool, tmp_path: Path) -> None:
    refused_stream(write(tmp_path, CIFAR100, packed, **changed), "data.root", *parts)


def test_label_without_a_name(tmp_path: Path) -> None:
    changed = batch(data=images_in("test", 4), fine_labels=[0, 1, 2, 3])
    refused_stream(write(tmp_path, CIFAR100, True, test=changed), "test labels", "0 to 2", "got 3")


@both
@pytest.mark.parametrize("packed", [True, False])
def test_code_in_a_batch_does_not_run(kind: type[CIFAR10], packed: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in (kind.files[0][-1], kind.files[1][0], kind.names_file):
        stream = write(tmp_path, kind, packed, **{name: pickle.dumps({"data": Bomb(marker)}, 2)})
        refused_stream(stream, "data.root", name, "cannot be read", "mkdir")
        assert not marker.exists()


@both
def test_damaged_archive(kind: type[CIFAR10], tmp_path: Path) -> None:
    stream = write(tmp_path, kind, True)
    path = tmp_path / LAYOUTS[kind][1]
    content = path.read_bytes()
    for length in range(0, len(content), 997):
        path.write_bytes(content[:length])
        refused_stream(stream, "data.root", str(path), "damaged")


@both
def test_link_to_a_file_elsewhere_is_refused(kind: type[CIFAR10], tmp_path: Path) -> None:
    folder, archive = LAYOUTS[kind][:2]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        member = tarfile.TarInfo(f"{folder}/{kind.names_file}")
        member.type, member.linkname = tarfile.SYMTYPE, os.devnull
        packed.addfile(member)
    (tmp_path / archive).write_bytes(content.getvalue())
    refused_stream(kind(str(tmp_path)), "data.root", archive, "is a link")


@both
def test_nothing_there(kind: type[CIFAR10], tmp_path: Path) -> None:
    parts = (LAYOUTS[kind][0], LAYOUTS[kind][1], "root/train/<class>/", "download=true")
    refused_stream(kind(str(tmp_path)), f"data.root='{tmp_path}'", *parts)


@both
def test_download(kind: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        fetched.append((url, md5))
        Path(root, filename).write_bytes(b"an archive")

    def fail(*_: Any) -> None:
        raise RuntimeError("no network")

    def stream(download: bool = True) -> Callable[[], None]:
        return kind(str(tmp_path), download=download).prepare_data

    archive = LAYOUTS[kind][1]
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)
    stream(download=False)()
    refused(stream(), "data.download=true", archive, str(tmp_path), "no network")
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fetch)
    stream()()
    stream()()
    assert len(fetched) == 1 and fetched[0][0].endswith(archive)
    assert [path.name for path in tmp_path.iterdir()] == [archive]
