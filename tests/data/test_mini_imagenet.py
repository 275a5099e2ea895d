"""mini-ImageNet's archives, on tiny ones written here."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mh_lightning.data import MiniImageNet
from mh_lightning.data.array_pickle import as_array, read_array_pickle
from tests.data.pickles import Bomb, python_2_pickle
from tests.data.refusal import refused_stream

PARTS = ("train", "val", "test")
CLASSES = {"train": ("n03", "n01", "n02"), "val": ("n09",), "test": ("n05", "n04")}
SAMPLES = 10


def content_of(part: str) -> dict[str, Any]:
    """Ten images a class; the classes are listed in another order than their samples have."""
    names = CLASSES[part]
    generator = np.random.default_rng(PARTS.index(part))
    images = generator.integers(0, 256, (SAMPLES * len(names), 4, 4, 3), dtype=np.uint8)
    places = {name: list(range(SAMPLES * index, SAMPLES * (index + 1))) for index, name in enumerate(names)}
    return {"image_data": images, "class_dict": {name: places[name] for name in sorted(names)}}


def write(root: Path, part: str, content: object, protocol: int = 4) -> Path:
    path = root / f"mini-imagenet-cache-{part}.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in PARTS:
        write(tmp_path, part, content_of(part))
    return tmp_path


def assert_whole(stream: MiniImageNet) -> None:
    """All images of the three parts, each with its class."""
    splits = stream.load()
    assert splits.class_names == ["n03", "n01", "n02", "n09", "n05", "n04"]
    assert splits.test is splits.validation is None
    expected = np.concatenate([content_of(part)["image_data"] for part in PARTS])
    assert splits.train.inputs.dtype == torch.uint8 and np.array_equal(splits.train.inputs.numpy(), expected)
    assert splits.train.labels.tolist() == np.repeat(np.arange(6), SAMPLES).tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_archives_of_python_3(protocol: int, root: Path) -> None:
    for part in PARTS:
        write(root, part, content_of(part), protocol)
    assert_whole(MiniImageNet(str(root)))


def test_archives_of_python_2_and_of_both_numpy_names(root: Path) -> None:
    train = content_of("train")
    write(root, "train", python_2_pickle(train))
    for part, old, new in (("val", b"numpy.core.", b"numpy._core."), ("test", b"numpy._core.", b"numpy.core.")):
        write(root, part, pickle.dumps(content_of(part), 2).replace(old, new))
    assert_whole(MiniImageNet(str(root)))


def test_python_2_pickle_is_one() -> None:
    images = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    loaded = pickle.loads(python_2_pickle({"image_data": images, "class_dict": {"n01": [0, 300]}}), encoding="latin1")
    assert np.array_equal(loaded["image_data"], images) and loaded["class_dict"] == {"n01": [0, 300]}


@pytest.mark.parametrize("kind", [np.array, lambda listed: [np.int64(index) for index in listed], np.uint16])
def test_indices_may_be_arrays(kind: Callable[[list[int]], Any], root: Path) -> None:
    for protocol in (2, 5):
        content = content_of("train")
        content["class_dict"] = {name: kind(indices) for name, indices in content["class_dict"].items()}
        write(root, "train", content, protocol)
        assert_whole(MiniImageNet(str(root)))


def test_fortran_order_and_byte_order(tmp_path: Path) -> None:
    for array in (np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(4, dtype=">i4"), np.float32([1.5])):
        for protocol in (2, 4, 5):
            (tmp_path / "array.pkl").write_bytes(pickle.dumps(array, protocol))
            assert np.array_equal(as_array(read_array_pickle(tmp_path / "array.pkl")), array)


def test_stream(root: Path) -> None:
    stream = MiniImageNet(str(root), increment=2, validation_tasks="first_half")
    stream.setup("fit")
    assert stream.class_groups == [[0, 1], [2, 3], [4, 5]]
    assert [stream.num_samples("train", task) for task in range(3)] == [14] * 3
    assert [stream.num_samples("test", task) for task in range(3)] == [4] * 3
    assert [stream.num_samples("validation", task) for task in range(3)] == [2, 0, 0]
    x, targets, _ = next(iter(stream.test_dataloader()[0]))
    expected = content_of("train")["image_data"][8:10]
    assert targets[:2].tolist() == [0, 0]
    assert np.array_equal((x[:2] * 255).round().permute(0, 2, 3, 1).numpy(), expected)


def test_without_class_dict_600_images_a_class(root: Path) -> None:
    for part in PARTS:
        write(root, part, {"image_data": np.zeros((1200, 1, 1, 3), dtype=np.uint8)})
    splits = MiniImageNet(str(root)).load()
    assert splits.class_names == ["train 0", "train 1", "val 0", "val 1", "test 0", "test 1"]
    assert splits.train.labels.tolist() == np.repeat(np.arange(6), 600).tolist()
    path = write(root, "val", {"image_data": np.zeros((1201, 1, 1, 3), dtype=np.uint8)})
    refused_stream(MiniImageNet(str(root)), "data.root", str(path), "no class_dict", "1201", "600")


def test_folder_of_images(tmp_path: Path) -> None:
    for name in ("cat", "ant"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    stream = MiniImageNet(str(tmp_path))
    stream.setup("fit")
    assert stream.class_names == ["ant", "cat"]
    assert stream._splits["test"].inputs == [
        str(tmp_path / name / f"{n}.png") for name in ("ant", "cat") for n in (8, 9)
    ]
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    refused_stream(MiniImageNet(str(tmp_path)), "data.root", str(tmp_path / "cat" / "0.png"), "cannot be read")
    MiniImageNet(str(tmp_path), check_images=False).setup("fit")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    refused_stream(MiniImageNet(str(tmp_path)), "data.root", "train and test", "next to each other")


def test_nothing_there(tmp_path: Path) -> None:
    layout = ("data.root", "mini-imagenet-cache-train.pkl", "root/<class>/")
    refused_stream(MiniImageNet(str(tmp_path / "nowhere")), *layout, "does not exist")
    refused_stream(MiniImageNet(str(tmp_path)), *layout, "holds no class folder")


def test_split_fractions_are_needed(root: Path) -> None:
    refused_stream(MiniImageNet(str(root), split_fractions=None), "data.split_fractions is null", "[0.7, 0.1, 0.2]")


def changed(**entries: object) -> dict[str, Any]:
    return content_of("val") | entries


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (changed(image_data=np.zeros((10, 4, 4, 3))), ("uint8", "float64")),
        (changed(image_data=np.zeros((10, 3, 4, 4), dtype=np.uint8)), ("uint8", "(10, 3, 4, 4)")),
        (changed(image_data=np.zeros((10, 48), dtype=np.uint8)), ("(10, 48)",)),
        (changed(image_data=np.zeros((0, 4, 4, 3), dtype=np.uint8)), ("(0, 4, 4, 3)",)),
        (changed(image_data=np.zeros((10, 5, 4, 3), dtype=np.uint8)), ("one size", "(5, 4, 3)")),
        (changed(image_data=np.array([None] * 10)), ("cannot be read", "'O8'")),
        (changed(image_data=np.zeros(10, dtype="u1,u1")), ("cannot be read", "'V2'")),
        (changed(image_data=[[1, 2], [3, 4]]), ("cannot be read",)),
        (changed(image_data=None), ("cannot be read", "no array")),
        (changed(class_dict={"n09": list(range(9))}), ("class_dict", "10 samples")),
        (changed(class_dict={"n09": list(range(11))}), ("class_dict", "10 samples")),
        (changed(class_dict={"n09": list(range(10)), "n10": [3]}), ("class_dict", "10 samples")),
        (changed(class_dict={"n09": list(range(10)), "n10": []}), ("class_dict", "for each class some")),
        (changed(class_dict={"n09": [float(index) for index in range(10)]}), ("cannot be read",)),
        (changed(class_dict={"n09": np.arange(10.0)}), ("cannot be read", "class_dict")),
        (changed(class_dict={"n09": np.arange(10).reshape(2, 5)}), ("cannot be read", "class_dict")),
        (changed(class_dict={}), ("class_dict", "10 samples")),
        (changed(class_dict=3), ("cannot be read",)),
        (changed(class_dict={"n01": list(range(10))}), ("'n01'", "two of the archives")),
        (changed(class_dict=OrderedDict(n09=list(range(10)))), ("collections.OrderedDict",)),
        ({"data": 1}, ("cannot be read", "image_data")),
        ([1, 2], ("cannot be read", "image_data")),
        (b"", ("cannot be read",)),
        (b"this is no pickle", ("cannot be read",)),
    ],
)
def test_refused_archives(content: object, parts: tuple[str, ...], root: Path) -> None:
    write(root, "val", content)
    refused_stream(MiniImageNet(str(root)), "data.root", *parts)


def test_missing_archive(root: Path) -> None:
    (root / "mini-imagenet-cache-val.pkl").unlink()
    refused_stream(MiniImageNet(str(root)), "data.root", "lacks mini-imagenet-cache-val.pkl")


def test_code_in_an_archive_does_not_run(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in (
        Bomb(marker),
        changed(more=Bomb(marker)),
        changed(image_data=np.array([Bomb(marker)], dtype=object)),
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path = write(root, "val", content, protocol)
            refused_stream(MiniImageNet(str(root)), "data.root", str(path), "cannot be read")
            assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(Vprint(1)\ntR.",
        b"cos\nsystem\n(Vtrue\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"ccodecs\nopen\n.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"cnumpy\nndarray\n}Vdtype\nK\x01sb.",  # sets an attribute of a class
        b"\x80\x02cnumpy\ndtype\nN}Vdtype\nK\x01s\x86b.",
        b"\x80\x02c_codecs\nencode\nN}V__doc__\nK\x01s\x86b.",
        b"cnumpy\nndarray\n)\x81(K\x01K\x01K\x02NVabc\ntb.",  # an array whose type is a number
        b"cnumpy\ndtype\n(Vu1\ntRK\x07b.",
        b"cnumpy\ndtype\n(Vu16\ntR.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"0" * 100,
        b"\x80\x05\x8e" + b"\x7f" * 8 + b"abc",
        b"\x80\x02" + b"]" * 10 + b"a" * 20 + b".",
    ],
)
def test_other_programs_are_refused(program: bytes, root: Path) -> None:
    path = write(root, "val", program)
    refused_stream(MiniImageNet(str(root)), "data.root", str(path), "cannot be read")
    write(root, "val", content_of("val"))
    assert_whole(MiniImageNet(str(root)))  # nothing has been changed by it


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_damaged_archives(protocol: int, root: Path) -> None:
    path = write(root, "val", content_of("val"), protocol)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused_stream(MiniImageNet(str(root)), "data.root", str(path), "cannot be read")
    for position in range(0, len(content), 3):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        try:
            MiniImageNet(str(root)).setup("fit")
        except Exception as error:
            assert type(error).__name__ == "UserError", f"byte {position}"
    reader = io.BytesIO(content)
    assert pickle.load(reader)["image_data"].shape == (10, 4, 4, 3)
