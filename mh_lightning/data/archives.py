"""Archives of images, unpacked once and as a whole, or read without being unpacked; nothing in them is trusted."""

import io
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from mh_lightning.errors import UNREADABLE, UserError, reason_of

DAMAGED = (*UNREADABLE, tarfile.TarError, lzma.LZMAError, MemoryError, OverflowError)
BIG = 2**26  # bytes of an archive that takes long enough for a progress bar
BLOCK = 512  # bytes; one of zeros ends a tar archive
CHUNK = 2**20

# tells by its path whether a file in an archive is needed
Wanted = Callable[[tuple[str, ...]], bool]


def unpack(archive: Path, folder: Path, flat: bool = False) -> None:
    """Unpack what an archive holds in a folder of that name. If `folder` is there already, nothing is done.

    Files are written into a folder beside, which gets its name in the end, so that a run that is killed leaves no
    folder that looks complete. Links, devices and paths that lead out of the folder are refused.

    Args:
        archive: .zip, or .tar, compressed or not.
        folder: where to; its last name is the folder in the archive.
        flat: the archive holds no such folder, and all of its files are wanted.

    Raises:
        UserError: if the archive is damaged or refused, has no such folder, or the files cannot be written.
    """
    if folder.is_dir():
        return
    with _workplace(folder.parent) as work:
        if folder.is_dir():  # another process has unpacked it in the meantime
            return
        rank_zero_info(f"Unpacking {archive} into {folder}, once.")
        whole = work / folder.name
        for parts, content in _files(archive, lambda parts: flat or parts[0] == folder.name):
            _write((whole if flat else work).joinpath(*parts), content)
        if not whole.is_dir():
            raise UserError(
                f"data.root: the archive {str(archive)!r} holds no file in a folder {folder.name}; fetch the official "
                "one."
            )
        whole.rename(folder)


def unpack_each(archive: Path, folder: Path, names: Collection[str]) -> None:
    """Unpack the archives ``<name>.tar`` that are in an archive, each into ``folder/<name>/``, as `unpack` does.

    Args:
        archive: .tar of others.
        folder: where to.
        names: those that are wanted. Those that are there already are left alone.

    Raises:
        UserError: if the archive is damaged or refused or lacks a name, or the files cannot be written.
    """
    missing = [name for name in names if not (folder / name).is_dir()]
    if not missing:
        return
    with _workplace(folder.parent) as work:
        folder.mkdir(exist_ok=True)
        missing = [name for name in missing if not (folder / name).is_dir()]
        wanted = {f"{name}.tar" for name in missing}
        rank_zero_info(f"Unpacking {len(missing)} classes of {archive} into {folder}, once.")
        for parts, content in _files(archive, lambda parts: parts[-1] in wanted):
            whole = work / parts[-1].removesuffix(".tar")
            whole.mkdir()
            with _naming(archive):
                images = list(_files_of_tar(io.BytesIO(content), lambda parts: True))
            for inner, image in images:
                _write(whole.joinpath(*inner), image)
            whole.rename(folder / whole.name)
        lacking = [name for name in missing if not (folder / name).is_dir()]
        if lacking:
            raise UserError(f"data.root: the archive {str(archive)!r} lacks {lacking[0]}.tar; fetch the official one.")


def read_files(archive: Path, folder: str, names: Collection[str]) -> dict[str, bytes]:
    """The contents of some files in an archive's `folder`, by name, without unpacking it; those that it lacks are left
    out.

    Raises:
        UserError: if the archive is damaged or refused.
    """
    return {
        parts[-1]: content
        for parts, content in _files(archive, lambda parts: parts[:-1] == (folder,) and parts[-1] in names)
    }


@contextmanager
def _workplace(root: Path) -> Iterator[Path]:
    """An empty folder in `root`, for one process at a time; what is left in it is removed."""
    work = root / ".unpacking"
    try:
        with FileLock(root / f"{work.name}.lock"):
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data.root={str(root)!r}: the archives cannot be unpacked there ({reason_of(error)}); make room, or give "
            "a folder that can be written."
        ) from error


@contextmanager
def _naming(archive: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise UserError(
            f"data.root: the archive {str(archive)!r} is damaged or no official one ({reason_of(error)}); fetch it "
            "again."
        ) from error


def _files(archive: Path, wanted: Wanted) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Paths and contents of the files in an archive that are wanted."""
    files_of = _files_of_zip if archive.suffix == ".zip" else _files_of_tar
    with _naming(archive):
        size = archive.stat().st_size
        with (
            archive.open("rb") as source,
            tqdm(total=size, desc=archive.name, unit="B", unit_scale=True, disable=size < BIG) as bar,
        ):
            for parts, content in files_of(source, wanted):
                bar.update(source.tell() - bar.n)
                yield parts, content


def _files_of_zip(source: IO[bytes], wanted: Wanted) -> Iterator[tuple[tuple[str, ...], bytes]]:
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            parts = _parts_of(entry.filename)
            if not entry.is_dir() and wanted(parts):
                yield parts, archive.read(entry)


def _files_of_tar(source: IO[bytes], wanted: Wanted) -> Iterator[tuple[tuple[str, ...], bytes]]:
    with tarfile.open(fileobj=source) as archive:
        for member in archive:
            # not tarfile's own filter, which links could lead astray in many releases of Python
            parts = _parts_of(member.name)
            if member.isdir():
                continue
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                raise ValueError(f"{member.name!r} is a link or a device")
            if wanted(parts):
                yield parts, file.read()
        rest = archive.fileobj
        assert rest is not None
        # tarfile takes a damaged header, or the end of the file, for the end of the archive
        rest.seek(archive.offset)
        if rest.read(BLOCK) != bytes(BLOCK):
            raise EOFError("it ends early")
        while rest.read(CHUNK):  # a compressed one has its checksum at the end
            pass


def _parts_of(name: str) -> tuple[str, ...]:
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of its folder")
    return path.parts


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
