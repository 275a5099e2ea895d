"""Files are read once, and again when they have changed."""

import os
import sqlite3
from pathlib import Path

import pytest

from mh_lightning.data.features import file_digests
from mh_lightning.data.features.file_digests import NAME, FileDigests, digests_of_files
from mh_lightning.data.images import ImageReading
from mh_lightning.errors import UserError

READING, UPRIGHT = ImageReading(), ImageReading(upright=True)
LONG_AGO = 10**9


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        path.write_bytes(path.stem.encode() * 5)
        os.utime(path, (LONG_AGO, LONG_AGO))
    return [str(path) for path in paths]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read."""
    names: list[str] = []
    whole = file_digests.digest_of_file

    def noted(path: str, reading: ImageReading) -> bytes:
        names.append(Path(path).name)
        return whole(path, reading)

    monkeypatch.setattr(file_digests, "digest_of_file", noted)
    return names


def test_each_file_is_read_once(tmp_path: Path, files: list[str], read: list[str]) -> None:
    wanted = digests_of_files(files, READING)
    read.clear()
    assert FileDigests(tmp_path / "cache").of(files, READING) == wanted and read == ["a.png", "b.png", "c.png"]
    read.clear()
    assert FileDigests(tmp_path / "cache").of([files[2], files[0], files[0]], READING) == [
        wanted[2], wanted[0], wanted[0]]  # fmt: skip
    assert read == []
    assert FileDigests(tmp_path / "cache").of(files, UPRIGHT) == digests_of_files(files, UPRIGHT) != wanted


def test_a_file_that_changed_is_read_again(tmp_path: Path, files: list[str], read: list[str]) -> None:
    digests = FileDigests(tmp_path)
    digests.of(files, READING)
    Path(files[0]).write_bytes(b"more than before")  # another size
    os.utime(files[0], (LONG_AGO, LONG_AGO))
    Path(files[1]).write_bytes(b"BBBBB")  # another time
    os.utime(files[1], (LONG_AGO + 1, LONG_AGO + 1))
    read.clear()
    found = digests.of(files, READING)
    assert read == ["a.png", "b.png"] and found == digests_of_files(files, READING)
    read.clear()
    assert digests.of(files, READING) == found and read == []


def test_a_file_that_is_new_may_change_again_within_a_tick(tmp_path: Path, files: list[str], read: list[str]) -> None:
    digests = FileDigests(tmp_path)
    os.utime(files[0])
    digests.of(files, READING)
    state = os.stat(files[0])
    Path(files[0]).write_bytes(b"AAAAA")
    os.utime(files[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests.of(files, READING) == digests_of_files(files, READING)


def test_names_that_are_no_text(tmp_path: Path, read: list[str]) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    with open(path, "wb") as file:
        file.write(b"x")
    os.utime(path, (LONG_AGO, LONG_AGO))
    digests = FileDigests(tmp_path)
    assert digests.of([os.fsdecode(path)], READING) == digests.of([os.fsdecode(path)], READING) and len(read) == 1


def test_a_damaged_index_is_told_and_not_used(tmp_path: Path, files: list[str], read: list[str]) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 100)
    with pytest.warns(UserWarning, match=r"files.sqlite' cannot be used .* delete it"):
        assert FileDigests(tmp_path).of(files, READING) == digests_of_files(files, READING)


def test_nothing_is_left_open(tmp_path: Path, files: list[str]) -> None:
    digests = FileDigests(tmp_path)
    digests.of(files, READING)
    with sqlite3.connect(tmp_path / NAME, timeout=0.1) as other:  # nobody holds a lock
        other.execute("DELETE FROM files")
    other.close()
    assert digests.of(files, READING) == digests_of_files(files, READING)


def test_files_that_cannot_be_read(tmp_path: Path, files: list[str]) -> None:
    FileDigests(tmp_path).of(files, READING)
    os.remove(files[1])
    for paths in (files, [*files, str(tmp_path / "none.png")]):
        with pytest.raises(UserError, match=r"image .*(b|none).png' cannot be read"):
            FileDigests(tmp_path).of(paths, READING)
