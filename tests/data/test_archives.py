"""Unpacking, on tiny archives written here, some of them damaged or hostile."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mh_lightning.data import archives
from mh_lightning.data.archives import read_files, unpack, unpack_each
from tests.data.packed import packed, tar_of
from tests.data.refusal import refused

KINDS = ("set.tar", "set.tar.gz", "set.tgz", "set.zip")
FILES = {"set/a/1.jpg": b"one" * 50, "set/b/c/2.jpg": b"two", "set/README.txt": b"", "notes.txt": b"not in the folder"}


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dot", ["", "./"])
def test_unpacks_the_folder(kind: str, dot: str, root: Path) -> None:
    (root / kind).write_bytes(packed(kind, {f"{dot}{name}": content for name, content in FILES.items()}))
    unpack(root / kind, root / "set")
    assert written(root / "set") == {
        name.removeprefix("set/"): data for name, data in FILES.items() if name != "notes.txt"
    }
    assert {path.name for path in root.iterdir()} <= {kind, "set", ".unpacking.lock"}


def test_flat_archive(root: Path) -> None:
    (root / "val.tar").write_bytes(tar_of({"1.JPEG": b"one", "2.JPEG": b"two"}))
    unpack(root / "val.tar", root / "val", flat=True)
    assert written(root / "val") == {"1.JPEG": b"one", "2.JPEG": b"two"}


@pytest.mark.parametrize("kind", KINDS)
def test_happens_once(kind: str, root: Path) -> None:
    (root / kind).write_bytes(packed(kind, FILES))
    unpack(root / kind, root / "set")
    (root / "set" / "README.txt").write_bytes(b"changed")
    (root / kind).unlink()  # not even looked at
    unpack(root / kind, root / "set")
    assert (root / "set" / "README.txt").read_bytes() == b"changed"


def test_waits_for_another_process(root: Path) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))
    with ThreadPoolExecutor() as pool, FileLock(root / ".unpacking.lock"):
        unpacking = pool.submit(unpack, root / "set.tar", root / "set")
        with pytest.raises(TimeoutError):
            unpacking.result(timeout=0.2)
        (root / "set").mkdir()  # the other one is done
    unpacking.result()
    assert written(root / "set") == {}


def test_interrupted_is_redone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))
    write, calls = archives._write, []

    def interrupted(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(archives, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(root / "set.tar", root / "set")
    monkeypatch.undo()
    assert not (root / "set").exists()
    left = root / ".unpacking" / "set" / "a"  # what a run that is killed leaves there
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"on")
    unpack(root / "set.tar", root / "set")
    assert "a/half.jpg" not in written(root / "set") and "a/1.jpg" in written(root / "set")
    assert not (root / ".unpacking").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["/{}/escaped", "../escaped", "set/../../escaped", "set\\..\\..\\escaped", "C:escaped"]
)
def test_paths_out_of_the_folder_are_refused(kind: str, name: str, root: Path, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    (root / kind).write_bytes(packed(kind, {**FILES, name: b"evil"}))
    for action in (lambda: unpack(root / kind, root / "set"), lambda: read_files(root / kind, "set", [])):
        refused(action, "data.root", str(root / kind), "out of its folder")
    assert {path.name for path in tmp_path.iterdir()} == {"root"}
    assert {path.name for path in root.iterdir()} <= {kind, ".unpacking.lock"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "..", "a/1.jpg"])
def test_links_and_devices_are_refused(kind: bytes, target: str, root: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("set/link")
        member.type, member.linkname = kind, target
        archive.addfile(member)
        archive.addfile(tarfile.TarInfo("set/link/1.jpg"))
    (root / "set.tar").write_bytes(content.getvalue())
    refused(lambda: unpack(root / "set.tar", root / "set"), "data.root", "set.tar", "'set/link' is a link or a device")
    assert not (root / "set").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_anywhere_is_damaged(kind: str, root: Path) -> None:
    content = packed(kind, FILES)
    end = len(content)
    if kind == "set.tar":  # zeros fill it up after the block that ends it
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for length in {*range(0, end, 31), *range(0, end, 512)}:
        (root / kind).write_bytes(content[:length])
        refused(lambda: unpack(root / kind, root / "set"), "data.root", str(root / kind), "damaged")
        assert not (root / "set").exists()


@pytest.mark.parametrize("kind", ["set.tar.gz", "set.zip"])
def test_flipped_bytes(kind: str, root: Path) -> None:
    content = packed(kind, FILES)
    for position in range(0, len(content), 3):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        (root / kind).write_bytes(broken)
        try:
            found = read_files(root / kind, "set", ["README.txt"])
        except ValueError as error:
            assert type(error).__name__ == "UserError", f"byte {position}"
        else:
            assert found in ({"README.txt": b""}, {})


def test_damaged_header_in_the_middle(root: Path) -> None:
    broken = bytearray(tar_of(FILES))
    broken[1024 + 148] ^= 0xFF  # the checksum of the second file's header
    (root / "set.tar").write_bytes(broken)
    refused(lambda: unpack(root / "set.tar", root / "set"), "data.root", "damaged")


def test_other_folder_inside(root: Path) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))
    refused(lambda: unpack(root / "set.tar", root / "cars"), "data.root", "set.tar", "no file in a folder cars")


def test_root_that_cannot_be_written(root: Path) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))
    (root / ".unpacking").write_bytes(b"a file where the folder belongs")
    refused(lambda: unpack(root / "set.tar", root / "set"), f"data.root='{root}'", "cannot be unpacked there")


def test_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "_write", full)
    refused(lambda: unpack(root / "set.tar", root / "set"), f"data.root='{root}'", "No space left", "make room")
    assert not (root / "set").exists() and not (root / ".unpacking").exists()


NESTED = {f"{name}.tar": tar_of({f"{name}_1.JPEG": name.encode()}) for name in ("n01", "n02", "n03")}


def test_nested_archives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train.tar").write_bytes(tar_of(NESTED))
    unpack_each(root / "train.tar", root / "train", ["n03", "n01"])
    assert written(root / "train") == {"n01/n01_1.JPEG": b"n01", "n03/n03_1.JPEG": b"n03"}
    (root / "train" / "n01" / "n01_1.JPEG").write_bytes(b"changed")
    unpack_each(root / "train.tar", root / "train", ["n01", "n02"])
    assert written(root / "train") == {"n01/n01_1.JPEG": b"changed", "n02/n02_1.JPEG": b"n02", "n03/n03_1.JPEG": b"n03"}
    monkeypatch.setattr(archives, "_files", None)
    unpack_each(root / "train.tar", root / "train", ["n01", "n02", "n03"])


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (NESTED | {"n02.tar": NESTED["n02.tar"][:700]}, ("train.tar", "damaged")),
        (NESTED | {"n02.tar": tar_of({"../n01/n01_1.JPEG": b"evil"})}, ("train.tar", "out of its folder")),
        ({"n01.tar": NESTED["n01.tar"]}, ("lacks n02.tar",)),
    ],
)
def test_nested_archives_that_are_refused(files: dict[str, bytes], parts: tuple[str, ...], root: Path) -> None:
    (root / "train.tar").write_bytes(tar_of(files))
    refused(lambda: unpack_each(root / "train.tar", root / "train", ["n01", "n02"]), "data.root", *parts)
    assert written(root / "train") == {"n01/n01_1.JPEG": b"n01"}  # whole, and kept
    (root / "train.tar").write_bytes(tar_of(NESTED))
    unpack_each(root / "train.tar", root / "train", ["n01", "n02"])
    assert written(root / "train") == {"n01/n01_1.JPEG": b"n01", "n02/n02_1.JPEG": b"n02"}


def test_progress_bar_of_big_ones(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (root / "set.tar").write_bytes(tar_of(FILES))
    unpack(root / "set.tar", root / "set")
    assert "set.tar:" not in capsys.readouterr().err
    monkeypatch.setattr(archives, "BIG", 1)
    read_files(root / "set.tar", "set", ["README.txt"])
    assert "set.tar:" in capsys.readouterr().err
