"""Run folders, ``<run_dir>/<experiment>/version_N``: the newest, a new one, its checkpoints and its lock."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from mh_lightning.errors import UNREADABLE, UserError
from mh_lightning.files import release, try_lock

RUN_DIR = "runs"
CHECKPOINTS = "checkpoints"  # in the folder of each fit, from its start
LAST = "last"  # as ckpt_path: the newest checkpoint of the experiment's newest fit


def version_folders(experiment: Path) -> list[Path]:
    """The run folders of an experiment, the newest first.

    Args:
        experiment: the folder ``<run_dir>/<experiment>``.
    """
    numbers = [path.name.removeprefix("version_") for path in experiment.glob("version_*")]
    newest_first = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    return [experiment / f"version_{number}" for number in newest_first]


def new_version(experiment: Path) -> Path:
    """Make the next run folder of an experiment.

    Raises:
        UserError: if it cannot be made.
    """
    newest = next(iter(version_folders(experiment)), None)
    version = experiment / f"version_{0 if newest is None else int(newest.name.removeprefix('version_')) + 1}"
    try:
        version.mkdir(parents=True)
    except FileExistsError:
        if version.is_dir():  # another run was faster
            return new_version(experiment)
        raise UserError(f"run_dir: {str(experiment)!r} is no folder; give another --run_dir.") from None
    except OSError as error:
        raise UserError(
            f"run_dir: the run folder {str(experiment)!r} cannot be made ({error.strerror}); give another --run_dir."
        ) from error
    return version


def newest_fit(experiment: Path) -> Path | None:
    """The run folder of the newest fit of an experiment, finished or not, or None."""
    return next((folder for folder in version_folders(experiment) if (folder / CHECKPOINTS).is_dir()), None)


def newest_whole_checkpoint(run_folder: Path, option: str = "ckpt_path=last") -> Path | None:
    """The newest checkpoint that can be read to its end, or None if there is none at all. Damaged ones are told.

    Raises:
        UserError: if all of them are damaged.
    """
    folder = run_folder / CHECKPOINTS
    tasks = sorted(folder.glob("task_*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    candidates = [path for path in (folder / "last.ckpt", *tasks) if path.is_file()]
    for path in candidates:
        try:
            check_checkpoint(path, option.partition("=")[0])
        except UserError as error:
            rank_zero_warn(f"{error} An older one is taken, if there is one.")
        else:
            return path
    if candidates:
        raise UserError(
            f"{option}: no checkpoint in {str(folder)!r} is whole; "
            + ("leave --ckpt_path out to begin anew." if option.startswith("ckpt_path") else "train anew.")
        )
    return None


def chosen_checkpoint(ckpt_path: str | Path | None, experiment: Path) -> Path | None:
    """The checkpoint that an option means: a path, or "last" for the newest one of the experiment's newest fit.

    Raises:
        UserError: if it cannot be read.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != LAST:
        return Path(ckpt_path)
    newest = newest_fit(experiment)
    return None if newest is None else newest_whole_checkpoint(newest)


def check_checkpoint(path: Path, option: str = "ckpt_path") -> dict[str, Any]:
    """Read a checkpoint, its tensors mapped into memory, and compare its content with its checksums.

    Raises:
        UserError: if there is none, or it is damaged, would run code, or is none of this package.
    """
    if not path.is_file():
        raise UserError(
            f"{option}={str(path)!r} is no file; give one of a run folder's checkpoints/, or 'last' for the newest of "
            "the newest run."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        complete = {"architecture", "state_dict", "model", "stream", "num_features"} <= {*content}
    except UNREADABLE as error:
        raise UserError(
            f"{option}={str(path)!r} cannot be read; it is damaged, or holds more than weights and plain values, "
            "which is never loaded."
        ) from error
    if not complete:
        raise UserError(
            f"{option}={str(path)!r} is no checkpoint of mh_lightning; give one of a run folder's checkpoints/."
        )
    loaded: dict[str, Any] = content
    return loaded


@contextmanager
def locked(folder: Path, option: str = "ckpt_path=last") -> Iterator[None]:
    """Keep other processes out of a run's folder; the system's locks end with the process, however it ends.

    Args:
        folder: the run folder, or another one that a run writes into.
        option: that led there.

    Raises:
        UserError: if another process is in it.
    """
    try:
        lock = try_lock(folder / ".lock")
    except OSError:  # a disk without locks: nobody can be kept out
        yield
        return
    if lock is None:
        raise UserError(f"{option}: the run in {str(folder)!r} is still going on; wait for its end, or stop it.")
    try:
        yield
    finally:
        release(lock)
