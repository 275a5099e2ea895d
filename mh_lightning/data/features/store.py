"""Features on disk: an entry is a folder of shards, each written at once, checked, and mapped into memory."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mh_lightning.data.features.digest import DIGEST_BYTES
from mh_lightning.errors import UserError
from mh_lightning.files import as_a_whole

DESCRIPTION = "entry.json"
# what safetensors and the look at its content raise on a damaged file
DAMAGED = (SafetensorError, ValueError, LookupError, TypeError, RuntimeError)
SECONDS_OF_A_SHARD = 86400.0  # none takes as long
FORMAT = "mh_lightning features 1"


class Shard(NamedTuple):
    """A file of an entry."""

    path: Path
    digests: list[bytes]  # of the images
    features: Tensor  # (images, views, d), mapped into memory
    checksum: str


class Entry:
    """The features that one backbone gives, with one transform, of any images.

    Args:
        folder: of the entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[Path, tuple[int, Shard]] = {}  # with the time of their last change
        self._intact: set[Path] = set()
        self._index: dict[bytes, tuple[Shard, int]] = {}

    def describe(self, description: dict[str, Any]) -> None:
        """Make the folder, with a file that tells what it holds."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.description():
                text = json.dumps({**description, "format": FORMAT}, indent=2) + "\n"
                with as_a_whole(self.folder / DESCRIPTION) as partial:
                    partial.write_bytes(text.encode())
            for left in (*self.folder.glob(".*.tmp"), *self.folder.glob("*.lock")):  # by processes that were killed
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > SECONDS_OF_A_SHARD:
                        left.unlink()
        except OSError as error:
            raise UserError(
                f"data.feature_cache.folder: {str(self.folder)!r} cannot be made ({error.strerror}); give another."
            ) from error

    def description(self) -> dict[str, Any]:
        """What `describe` has written; empty if this is no entry."""
        try:
            description: dict[str, Any] = json.loads((self.folder / DESCRIPTION).read_text())
        except (OSError, ValueError):
            return {}
        return description if description.get("format") == FORMAT else {}

    @property
    def size_on_disk(self) -> int:
        """Bytes of all its files."""
        size = 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # locks come and go
                size += path.stat().st_size
        return size

    def shards(self) -> Iterator[Path]:
        """The shards' paths."""
        return iter(sorted(self.folder.glob("*.safetensors")))

    def find(self, digests: Sequence[bytes]) -> dict[bytes, tuple[Shard, int]]:
        """The shard and the row of those images whose features are there.

        Damaged shards are removed, with a warning; checksums are computed of those only that hold some of the images.
        """
        self._look()
        while True:
            found = {digest: self._index[digest] for digest in digests if digest in self._index}
            unchecked = {shard.path: shard for shard, _ in found.values() if shard.path not in self._intact}
            damaged = [path for path, shard in unchecked.items() if not is_intact(shard)]
            self._intact |= unchecked.keys() - set(damaged)
            if not damaged:
                return found
            for path in damaged:
                _remove_damaged(path)
                self._forget(path)

    def write(self, name: str, digests: Sequence[bytes], features: Tensor) -> None:
        """Write a shard of features (images, views, d); it is there as a whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        keys = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
        checksum = checksum_of(self.folder.name, keys, features)
        content = save({"digests": keys, "features": features.contiguous()}, {"checksum": checksum})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # someone may have deleted it meanwhile
            with as_a_whole(self.folder / f"{name}.safetensors") as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise UserError(
                f"data.feature_cache.folder: a shard cannot be written to {str(self.folder)!r} ({error}); make room or "
                "give another folder."
            ) from error

    def remove(self) -> None:
        """Delete the entry from the disk.

        Raises:
            UserError: if that is not allowed.
        """
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise UserError(f"entry {self.folder.name!r} cannot be deleted ({error}); mend its permissions.") from error

    def _look(self) -> None:
        """Open shards that are new or have changed, and forget those that have gone."""
        present = dict[Path, int]()
        for path in self.shards():
            try:
                present[path] = path.stat().st_mtime_ns
                if self._shards.get(path, (None,))[0] == present[path]:
                    continue
                shard = open_shard(path)
            except FileNotFoundError:  # another process has removed it
                continue
            except DAMAGED:
                _remove_damaged(path)
                continue
            except OSError as error:
                raise UserError(
                    f"data.feature_cache.folder: {str(path)!r} cannot be read ({error.strerror}); mend its permissions "
                    "or give another folder."
                ) from error
            self._forget(path)
            self._shards[path] = present[path], shard
            self._index |= _rows_of(shard)
        for path in self._shards.keys() - present.keys():
            self._forget(path)

    def _forget(self, path: Path) -> None:
        if self._shards.pop(path, None) is None:
            return
        self._intact.discard(path)
        self._index = {}
        for _, shard in self._shards.values():  # some of its images may be in others, too
            self._index |= _rows_of(shard)


def _rows_of(shard: Shard) -> dict[bytes, tuple[Shard, int]]:
    return {digest: (shard, row) for row, digest in enumerate(shard.digests)}


def _remove_damaged(path: Path) -> None:
    rank_zero_warn(f"data.feature_cache: {str(path)!r} is damaged; its images pass through the backbone again.")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"data.feature_cache.folder: {str(path)!r} is damaged and cannot be deleted ({error.strerror}); delete it, "
            "or give another folder."
        ) from error


def open_shard(path: Path) -> Shard:
    """Map a shard into memory, without a look at its checksum.

    Raises:
        OSError: if it cannot be read.
        DAMAGED: if it is no such file.
    """
    with path.open("rb"):  # the system's errors, as they are
        pass
    with safe_open(path, framework="pt") as file:
        digests, features = file.get_tensor("digests"), file.get_tensor("features")
        checksum = (file.metadata() or {})["checksum"]
    if digests.dtype != torch.uint8 or digests.shape != (len(features), DIGEST_BYTES) or features.dim() != 3:
        raise ValueError("no shard of features")
    raw = digests.numpy().tobytes()
    keys = [raw[start : start + DIGEST_BYTES] for start in range(0, len(raw), DIGEST_BYTES)]
    return Shard(path, keys, features, checksum)


def is_intact(shard: Shard) -> bool:
    """Whether a shard's content has its checksum."""
    keys = torch.frombuffer(bytearray(b"".join(shard.digests)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
    return checksum_of(shard.path.parent.name, keys, shard.features) == shard.checksum


def checksum_of(entry: str, digests: Tensor, features: Tensor) -> str:
    """Of a shard's tensors, their types and shapes, and the name of the entry that they belong to."""
    hasher = hashlib.sha256(entry.encode())
    for tensor in (digests, features):
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
