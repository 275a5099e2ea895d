"""Digests of image files that are read once: later, a path with its size and time of change tells them."""

import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from mh_lightning.data.features.digest import digest_bytes
from mh_lightning.data.images import ImageReading
from mh_lightning.errors import UserError

NAME = "files.sqlite"
SETTLED_NS = 2 * 10**9  # a file that changed more recently may change again within one tick of its clock
ROWS_OF_A_QUERY = 500
SECONDS_FOR_OTHERS = 60.0
TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB, reading TEXT, size INTEGER, changed INTEGER, digest BLOB, " \
        "PRIMARY KEY (path, reading)) WITHOUT ROWID"  # fmt: skip


class FileDigests:
    """Digests of files' content and of how they are read, in an SQLite file that many processes may share.

    A file is read again when its size or its time of change is another. One that was changed within the last two
    seconds is read each time, since its clock may be too coarse to tell another change.

    Args:
        folder: of the feature cache; the file is made there if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def of(self, paths: Sequence[str], reading: ImageReading, quiet: bool = True) -> list[bytes]:
        """Digests of files.

        Args:
            paths: of image files.
            reading: how they become RGB.
            quiet: no progress bar.

        Raises:
            UserError: if one of them cannot be read, or the folder cannot be made.
        """
        try:
            return self._of(paths, reading, quiet)
        except sqlite3.Error as error:
            rank_zero_warn(
                f"data.feature_cache.folder: {str(self.path)!r} cannot be used ({error}), so all images are read to "
                "tell whether they have changed; delete it, or give a folder on a local disk."
            )
            return digests_of_files(paths, reading)

    def _of(self, paths: Sequence[str], reading: ImageReading, quiet: bool) -> list[bytes]:
        here = os.getcwd()
        whole = [os.fsencode(os.path.join(here, path)) for path in paths]  # names need not be texts
        known = self._known(whole, repr(reading))
        digests: list[bytes] = []
        new: list[tuple[Any, ...]] = []
        waiting = sum(path not in known for path in whole)
        with tqdm(total=waiting, desc="Images read", unit=" images", disable=quiet or not waiting, leave=False) as bar:
            for path, place in zip(whole, paths, strict=True):
                size, changed = _state(place)
                found = known.get(path)
                if found is not None and found[:2] == (size, changed):
                    digests.append(found[2])
                    continue
                digests.append(digest_of_file(place, reading))
                bar.update()
                if time.time_ns() - changed > SETTLED_NS:
                    new.append((path, repr(reading), size, changed, digests[-1]))
        if new:
            with self._connected() as database:
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", new)
        return digests

    def _known(self, paths: Sequence[bytes], reading: str) -> dict[bytes, tuple[int, int, bytes]]:
        known: dict[bytes, tuple[int, int, bytes]] = {}
        with self._connected() as database:
            for start in range(0, len(paths), ROWS_OF_A_QUERY):
                some = paths[start : start + ROWS_OF_A_QUERY]
                marks = ", ".join("?" * len(some))
                query = f"SELECT path, size, changed, digest FROM files WHERE reading = ? AND path IN ({marks})"
                known |= {path: tuple(rest) for path, *rest in database.execute(query, [reading, *some])}
        return known

    def _connected(self) -> "_Transaction":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.feature_cache.folder: {str(self.path.parent)!r} cannot be made ({error.strerror}); give another."
            ) from error
        return _Transaction(self.path)


class _Transaction:
    """A connection that is closed at the end, which `sqlite3`'s own context leaves open."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, timeout=SECONDS_FOR_OTHERS)

    def __enter__(self) -> sqlite3.Connection:
        self.connection.execute(TABLE)
        return self.connection

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.connection.commit()
        self.connection.close()


def digests_of_files(paths: Sequence[str], reading: ImageReading) -> list[bytes]:
    """Of files, all of which are read."""
    return [digest_of_file(path, reading) for path in paths]


def digest_of_file(path: str, reading: ImageReading) -> bytes:
    """Of a file's bytes and how it is read.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return digest_bytes(repr(reading).encode(), file.read())
    except OSError as error:
        raise UserError(f"data: image {path!r} cannot be read ({error}); mend or remove it.") from error


def _state(path: str) -> tuple[int, int]:
    """Size and time of change, in ns."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"data: image {path!r} cannot be read ({error}); mend or remove it.") from error
    return state.st_size, state.st_mtime_ns
