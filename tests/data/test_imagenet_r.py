"""ImageNet-R's archive, on a tiny one written here."""

from pathlib import Path

import numpy as np
import pytest

from mh_lightning.data import ImageNetR
from tests.data.packed import images_of, tar_of
from tests.data.refusal import refused, refused_stream

CLASSES = {"n03": 10, "n01": 20, "n02": 15}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "imagenet-r.tar").write_bytes(
        tar_of({"imagenet-r/README.txt": b"n01 cat", **images_of(CLASSES, "imagenet-r/")})
    )
    return tmp_path


@pytest.mark.parametrize(("fraction", "tested"), [(0.2, [4, 3, 2]), (0.5, [10, 7, 5])])
def test_split(fraction: float, tested: list[int], root: Path) -> None:
    stream = ImageNetR(str(root), test_fraction=fraction, increment=1)
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == ["n01", "n02", "n03"]
    counts = np.bincount(splits.test.labels)
    assert np.abs(counts - tested).max() <= 1 and counts.sum() == -(-45 * fraction // 1)
    images = {*splits.train.inputs, *splits.test.inputs}
    assert images == {str(root / name) for name in images_of(CLASSES, "imagenet-r/")}
    assert len(splits.train.inputs) + len(splits.test.inputs) == 45
    for part in (splits.train, splits.test):
        assert [Path(path).parent.name for path in part.inputs] == [splits.class_names[label] for label in part.labels]
    again = ImageNetR(str(root), test_fraction=fraction, split_seed=7).load()
    assert again.test.inputs == splits.test.inputs  # always the same
    assert splits.test.inputs != sorted(splits.test.inputs)[: len(counts)]


def test_images_are_drawn_from_all_of_a_class(root: Path) -> None:
    stream = ImageNetR(str(root), test_fraction=0.5)
    stream.prepare_data()
    numbers = [int(Path(path).stem) for path in stream.load().test.inputs if "n01" in path]
    assert min(numbers) < 5 and max(numbers) >= 15  # files are named by their style


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_fraction_outside_0_to_1(fraction: float) -> None:
    refused(lambda: ImageNetR("data", test_fraction=fraction), "data.test_fraction", "(0, 1)", str(fraction))


def test_fraction_that_leaves_a_class_out(root: Path) -> None:
    stream = ImageNetR(str(root), test_fraction=0.01)
    stream.prepare_data()
    refused_stream(stream, "data.test_fraction=0.01", "45 samples")


def test_other_fraction_than_in_the_checkpoint(root: Path) -> None:
    streams = [ImageNetR(str(root), test_fraction=fraction, increment=1) for fraction in (0.2, 0.5)]
    for stream in streams:
        stream.prepare_data()
        stream.setup("test")
    saved = streams[0].state_dict()
    streams[0].load_state_dict(saved)
    refused(lambda: streams[1].load_state_dict(saved), "ckpt_path", "test_fraction 0.2 instead of 0.5")


def test_setup_before_unpacking(root: Path) -> None:
    refused_stream(ImageNetR(str(root)), "data.root", "imagenet-r.tar is not unpacked", "prepare_data()")
