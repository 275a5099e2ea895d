"""Runners that work on the same run folders at the same time."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from filelock import FileLock

from mh_lightning.errors import UserError
from mh_lightning.experiments.runs import Run
from mh_lightning.experiments.workers import run_all
from mh_lightning.files import try_lock

PAUSE = 1.0  # seconds between looks at the runs of others


def run_shared(runs: Sequence[Run], workers: int, on_start: Callable[[Run], None]) -> Generator[tuple[Run, str | None]]:
    """As `run_all`, but a run that another runner is at is left to it, and yielded once it has ended there.

    A run is held by a lock on its folder, which the system gives back when its runner ends, in whichever way. One that
    was stopped or that failed there is run here.

    Args:
        runs: what to run.
        workers: processes, among which the cores are divided.
        on_start: told of each run before it starts, or before it is yielded if it took place elsewhere.

    Raises:
        UserError: if a folder cannot be made or locked.
    """
    waiting = list(runs)
    locks: dict[str, FileLock] = {}

    def free(elsewhere: list[Run]) -> Iterator[Run]:
        for run in list(waiting):
            if (lock := _lock(run)) is None:
                continue
            waiting.remove(run)
            if run.result() is not None:
                lock.release()
                elsewhere.append(run)
                continue
            locks[run.name] = lock
            yield run

    try:
        while waiting:
            elsewhere: list[Run] = []
            with closing(run_all(free(elsewhere), workers, on_start)) as here:
                for run, error in here:
                    locks.pop(run.name).release()
                    yield run, error
            for run in elsewhere:
                on_start(run)
                yield run, None
            if waiting:
                time.sleep(PAUSE)
    finally:
        for lock in locks.values():
            lock.release()


def _lock(run: Run) -> FileLock | None:
    try:
        return try_lock(run.folder / ".lock")
    except OSError as error:
        raise UserError(
            f"--run_dir: {str(run.folder)!r} cannot be made or locked ({error}); give a folder on another disk."
        ) from error
