"""Bad tensor files, image folders and archives."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mh_lightning.cli import main
from tests.bad_input.table import DATA, MODEL, Place, Row, check, place, table, tensors
from tests.data.packed import images_of, picture, tar_of, write_files

__all__ = ["place"]


def tensor_file(name: str, change: Callable[[Place], dict[str, Any]], sentence: str, suffix: str = ".pt") -> Row:
    """The good tensors with some of them replaced."""

    def prepare(place: Place) -> list[Any]:
        path, entries = place.folder / f"bad{suffix}", tensors() | change(place)
        if suffix == ".safetensors":
            save_file(entries, path)
        elif suffix == ".npz":
            np.savez(path, **{key: np.asarray(entry) for key, entry in entries.items()})
        else:
            torch.save(entries, path)
        return [f"{DATA}path", path]

    return Row(name, prepare, sentence)


def raw_file(name: str, content: Callable[[Place], bytes], sentence: str, suffix: str) -> Row:
    return Row(name, lambda place: [f"{DATA}path", place.write(f"bad{suffix}", content(place))], sentence)


def half_of_the_stream(place: Place) -> bytes:
    content = (place.folder / "tensors.safetensors").read_bytes()
    return content[: len(content) // 2]


def half_of_a_pt_file(place: Place) -> bytes:
    file = io.BytesIO()
    torch.save(tensors(), file)
    return file.getvalue()[:900]


x, y = tensors()["x_train"], tensors()["y_train"]
TENSORS = (
    raw_file("half a safetensors file", half_of_the_stream, "cannot be read.*damaged", ".safetensors"),
    raw_file("empty safetensors file", lambda place: b"", "cannot be read.*damaged", ".safetensors"),
    raw_file("header of 2**64 bytes", lambda place: b"\xff" * 8, "cannot be read.*damaged", ".safetensors"),
    raw_file("half a pt file", half_of_a_pt_file, "cannot be read.*damaged", ".pt"),
    raw_file("empty pt file", lambda place: b"", "cannot be read.*damaged", ".pt"),
    raw_file("pickle that runs code", lambda place: pickle.dumps(place.bomb), "not only tensors", ".pt"),
    raw_file("the same as npz", lambda place: pickle.dumps(place.bomb), "cannot be read.*not only tensors", ".npz"),
    tensor_file("entry that runs code", lambda place: {"x_train": place.bomb}, "cannot be read.*not only tensors"),
    tensor_file("array that runs code", lambda place: {"x_train": np.array([place.bomb] * 16, dtype=object)},
                "Object arrays cannot be loaded", ".npz"),
    tensor_file("text labels", lambda place: {"y_train": np.array(["a"] * 16)}, "cannot be read.*numpy.str_", ".npz"),
    tensor_file("labels of 64 bits", lambda place: {"y_train": np.array([2**63 + 1] * 16, dtype=np.uint64)},
                "train labels must lie in", ".npz"),
    tensor_file("sparse", lambda place: {"x_train": x.to_sparse()}, "x_train must be a dense tensor"),
    tensor_file("without data", lambda place: {"x_train": x.to("meta")}, "x_train must be a dense tensor"),
    tensor_file("complex", lambda place: {"x_train": x + 1j}, "x_train must hold real samples"),
    tensor_file("scalar", lambda place: {"x_train": x[0, 0]}, "x_train must hold real samples"),
    tensor_file("nested", lambda place: {"x_train": {"a": x}}, "no dict of tensors"),
    tensor_file("no samples", lambda place: {name: entry[:0] for name, entry in tensors().items()}, "of the 0 samples"),
    tensor_file("float labels", lambda place: {"y_train": y.float()}, "y_train must hold one integer"),
    tensor_file("too few labels", lambda place: {"y_train": y[:5]}, "y_train must hold one integer for each of the 16"),
    tensor_file("negative labels", lambda place: {"y_train": y - 1}, "train labels must lie in 0 to 3.*got -1"),
    tensor_file("labels with gaps", lambda place: {"y_train": 5 * y}, "train labels must lie in 0 to 3.*got 5"),
    tensor_file("narrow test samples", lambda place: {"x_test": x[:, :2]}, "must have the same shape"),
    tensor_file("narrow samples", lambda place: {"x_test": x[:, :2], "x_train": x[:, :2]}, "num_features is 3.*2"),
    tensor_file("no features", lambda place: {"x_test": x[:, :0], "x_train": x[:, :0]}, "num_features is 3.*0"),
    tensor_file("NaN features", lambda place: {"x_test": x * torch.nan}, "test inputs hold NaN"),
    tensor_file("infinite features", lambda place: {"x_train": x * torch.inf}, "train inputs hold NaN or infinite"),
    tensor_file("too large for float32", lambda place: {"x_train": x.double() * 1e300}, "train inputs hold NaN or inf"),
    tensor_file("one class", lambda place: {"y_train": 0 * y, "y_test": 0 * y}, "do not add up to .* 1 classes"),
    tensor_file("class without test", lambda place: {"y_test": y.clamp(max=1)}, "no test sample of classes 2, 3"),
    tensor_file("flat images", lambda place: {"x_train": x.byte(), "x_test": x.byte()}, "images of type uint8"),
    Row("folder of tensors", lambda place: [f"{DATA}path", place.folder], "data.path=.* is no file"),
)  # fmt: skip


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image_config(place: Place, data: str, root: Path) -> list[Any]:
    backbone = {"class_path": "mh_lightning.backbones.TimmBackbone"}
    backbone["init_args"] = {"name": "test_efficientnet", "image_size": 32}  # type: ignore[assignment]
    settings = {"backbone": backbone, "head": "torch.nn.Linear"}
    model = {"class_path": "mh_lightning.methods.FineTuning", "init_args": settings}
    stream = {"class_path": f"mh_lightning.data.{data}", "init_args": {"root": str(root)}}
    return ["--config", place.changed(model=model, data=stream)]


def images(name: str, change: Callable[[Path, Place], Any], sentence: str, *options: str) -> Row:
    """A good folder of images, and what is done to it."""

    def prepare(place: Place) -> list[Any]:
        root = place.folder / "images"
        write_files(
            root, images_of({f"{split}/{kind}": 2 for split in ("train", "test") for kind in ("apple", "pear")})
        )
        change(root, place)
        return [*image_config(place, "ImageFolder", root), *options]

    return Row(name, prepare, sentence)


def image(name: str, content: bytes, sentence: str, *options: str) -> Row:
    row = images(name, lambda root, place: (root / "train/pear/0.jpg").write_bytes(content), sentence, *options)
    return row._replace(trained=bool(options))


def a_file(root: Path, place: Place) -> None:
    shutil.rmtree(root)
    root.write_text("no folder")


UNCHECKED = (f"{DATA}check_images", "false")
IMAGES = (
    images("no folder", lambda root, place: shutil.rmtree(root), "data.root: the folder .* does not exist"),
    images("file in its place", a_file, "data.root: the folder .* does not exist"),
    images("no classes", lambda root, place: [shutil.rmtree(path) for path in (root / "train").iterdir()],
           "holds no class folder"),
    images("class in train only", lambda root, place: shutil.rmtree(root / "test/pear"), "'pear' is in train only"),
    images("class without images", lambda root, place: [path.unlink() for path in (root / "test/pear").iterdir()],
           "test/pear' holds no image"),
    image("half a JPEG", picture()[:300], "0.jpg' cannot be read"),
    image("half a PNG", png(8, 8)[:41], "0.jpg' cannot be read"),
    image("no bytes", b"", "0.jpg' cannot be read"),
    image("text", b"hello world", "0.jpg' cannot be read"),
    image("no pixels", png(0, 0), "0.jpg' cannot be read"),
    image("decompression bomb", png(60000, 60000), "0.jpg' cannot be read.*decompression bomb"),
    image("bomb, met in training", png(60000, 60000), "0.jpg' cannot be read.*decompression bomb", *UNCHECKED),
    image("text, met in training", b"hello world", "0.jpg' cannot be read", *UNCHECKED),
    images("pickle in place of an image", lambda root, place: (root / "train/pear/0.jpg").write_bytes(
        pickle.dumps(place.bomb)), "0.jpg' cannot be read"),
    images("link to itself", lambda root, place: (root / "train/pear/x.jpg").symlink_to(root / "train/pear/x.jpg"),
           "x.jpg' cannot be read"),
    images("link to nothing", lambda root, place: (root / "train/pear/x.jpg").symlink_to("/nowhere"),
           "x.jpg' cannot be read"),
)  # fmt: skip


def archive(name: str, content: bytes, sentence: str) -> Row:
    def prepare(place: Place) -> list[Any]:
        return image_config(place, "ImageNetR", place.write("archives/imagenet-r.tar", content).parent)

    return Row(name, prepare, sentence)


def tar_of_a_link() -> bytes:
    content, member = io.BytesIO(), tarfile.TarInfo("imagenet-r/n1/0.jpg")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(member)
    return content.getvalue()


def a_loop_above(place: Place) -> list[Any]:
    (place.folder / "loop").symlink_to(place.folder / "loop")
    return image_config(place, "ImageFolder", place.folder / "loop")


ARCHIVES = (
    archive("path out of the folder", tar_of({"imagenet-r/../../../executed": picture()}), "leads out of its folder"),
    archive("absolute path", tar_of({"/executed": picture()}), "leads out of its folder"),
    archive("path of Windows", tar_of({"imagenet-r\\..\\..\\executed": picture()}), "leads out of its folder"),
    archive("link", tar_of_a_link(), "is a link or a device"),
    archive("half an archive", tar_of({"imagenet-r/n1/0.jpg": picture()})[:700], "damaged or no official one"),
    archive("empty archive", b"", "damaged or no official one"),
    archive("archive of something else", tar_of({"other/0.jpg": picture()}), "holds no file in a folder imagenet-r"),
    Row("root is a loop of links", a_loop_above, "does not exist|cannot be read"),
)


@table(*TENSORS, *IMAGES, *ARCHIVES)
def test_one_sentence(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(row, place, capsys)
    assert not os.path.lexists("/executed")


def test_duplicate_images_and_links_to_folders_are_ordinary_data(place: Place) -> None:
    """Data sets hold duplicates on purpose, so they are not refused; a link to a folder above is not followed."""
    root = place.folder / "images"
    write_files(root, images_of({f"{split}/{kind}": 2 for split in ("train", "test") for kind in ("apple", "pear")}))
    shutil.copy(root / "train/pear/0.jpg", root / "test/pear/0.jpg")
    shutil.copy(root / "train/pear/0.jpg", root / "train/apple/again.jpg")
    (root / "train/pear/loop").symlink_to(root / "train")
    config = [str(one) for one in image_config(place, "ImageFolder", root)]
    main(["fit", *config, "--run_dir", str(place.folder / "runs")])
    assert list(place.folder.rglob("results.json"))


def test_a_file_of_parameters_is_as_good_as_one_of_tensors(place: Place) -> None:
    torch.save({name: torch.nn.Parameter(entry, requires_grad=entry.is_floating_point())
                for name, entry in tensors().items()}, place.folder / "parameters.pt")  # fmt: skip
    options = [f"{DATA}path", str(place.folder / "parameters.pt"), f"{MODEL}head", "torch.nn.Linear"]
    main(["fit", "--config", str(place.config), "--run_dir", str(place.folder / "runs"), *options])
    assert list(place.folder.rglob("results.json"))
