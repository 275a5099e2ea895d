"""Fashion-MNIST's idx files, on tiny ones written here."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from mh_lightning.data import FashionMNIST
from tests.data.refusal import refused, refused_stream

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
LABELS = {"train": np.arange(30, dtype=np.uint8) % 10, "t10k": np.arange(20, dtype=np.uint8)[::-1] % 10}
IMAGES = {
    name: np.random.default_rng(0).integers(0, 256, (len(labels), 4, 5), dtype=np.uint8)
    for name, labels in LABELS.items()
}


def idx(array: NDArray[np.uint8], type_code: int = 8) -> bytes:
    """The idx format: two zero bytes, type, number of dimensions, big-endian sizes, values."""
    return bytes([0, 0, type_code, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write(folder: Path, compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in LABELS:
        for kind, array in (("images-idx3", IMAGES[name]), ("labels-idx1", LABELS[name])):
            content = idx(array)
            suffix = ".gz" if compressed else ""
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if compressed else content)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", ["", "raw", "FashionMNIST/raw"])
def test_reads_what_was_written(layout: str, compressed: bool, tmp_path: Path) -> None:
    write(tmp_path / layout, compressed)
    splits = FashionMNIST(str(tmp_path)).load()
    for part, name in ((splits.train, "train"), (splits.test, "t10k")):
        assert np.array_equal(part.inputs.numpy(), IMAGES[name]) and part.inputs.dtype == torch.uint8
        assert np.array_equal(part.labels, LABELS[name]) and part.labels.dtype == np.int64
    assert splits.class_names[0] == "T-shirt/top" and len(splits.class_names) == 10


def test_mixed_compression_and_no_download_when_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    plain = tmp_path / "t10k-labels-idx1-ubyte"
    plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", None)
    stream = FashionMNIST(str(tmp_path), download=True, increment=5)
    stream.prepare_data()
    monkeypatch.undo()
    stream.setup("fit")
    assert [stream.num_samples(split, task) for split in ("train", "test") for task in (0, 1)] == [15, 15, 10, 10]


def test_missing(tmp_path: Path) -> None:
    refused_stream(FashionMNIST(str(tmp_path / "nowhere")), "data.root=", "nowhere", "download=true")
    refused_stream(FashionMNIST(str(tmp_path)), "data.root=", str(tmp_path))
    write(tmp_path)
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = tmp_path / name
        content = path.read_bytes()
        path.unlink()
        refused_stream(FashionMNIST(str(tmp_path)), "data.root=", f"lacks {name}")
        path.write_bytes(content)
    FashionMNIST(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_anywhere(compressed: bool, tmp_path: Path) -> None:
    write(tmp_path, compressed)
    for path in (
        tmp_path / f"{name}{'.gz' * compressed}" for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    ):
        content = path.read_bytes()
        for length in range(0, len(content), 5 if len(content) < 100 else 60):
            path.write_bytes(content[:length])
            refused_stream(FashionMNIST(str(tmp_path)), "data.root", str(path), "damaged")
        path.write_bytes(content + b"\0")
        if not compressed:
            refused_stream(FashionMNIST(str(tmp_path)), "data.root", str(path), "damaged")
        path.write_bytes(content)


def test_flipped_bytes_of_a_compressed_file(tmp_path: Path) -> None:
    path = write(tmp_path, compressed=True) / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    for position in (*range(10, 40), *range(40, len(content), 25)):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        refused_stream(FashionMNIST(str(tmp_path)), "data.root", str(path), "damaged")


@pytest.mark.parametrize(
    "content",
    [
        idx(LABELS["train"]),  # labels in place of images
        idx(IMAGES["train"].view(np.int8), type_code=9),  # signed bytes
        b"\x89PNG" + idx(IMAGES["train"])[4:],
        b"",
    ],
)
def test_wrong_magic(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    refused_stream(FashionMNIST(str(tmp_path)), "data.root", str(path), "damaged")


@pytest.mark.parametrize("labels", [29, 31])
def test_as_many_labels_as_images(labels: int, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(labels, dtype=np.uint8) % 10))
    refused_stream(FashionMNIST(str(tmp_path)), "data.root")


def test_label_above_nine(tmp_path: Path) -> None:
    labels = LABELS["train"].copy()
    labels[3] = 10
    (write(tmp_path) / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    refused_stream(FashionMNIST(str(tmp_path)), "train labels", "0 to 9", "got 10")


def test_failing_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: str, download: bool) -> None:
        raise RuntimeError(f"Error downloading to {root}")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    refused(FashionMNIST(str(tmp_path), download=True).prepare_data, "data.download=true", str(tmp_path))
    FashionMNIST(str(tmp_path)).prepare_data()  # not asked to


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debian_package() -> None:
    splits = FashionMNIST(str(DEBIAN)).load()
    assert splits.train.inputs.shape == (60000, 28, 28) and splits.test.inputs.shape == (10000, 28, 28)
    assert np.bincount(splits.train.labels).tolist() == [6000] * 10
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    assert splits.class_names[splits.train.labels[0]] == "Ankle boot"
    assert splits.train.inputs.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)  # the published mean
