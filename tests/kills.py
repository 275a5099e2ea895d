"""Runs of the command line that are killed, and gone on with."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from mh_lightning.cli import main

KILLED, TERMINATED = -signal.SIGKILL, 128 + signal.SIGTERM


def run_in_child(
    arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None, seconds: float | None = None
) -> int:
    """Exit code of `main(arguments)` in a forked process, minus the signal that ended it.

    Args:
        arguments: of the command line.
        log: takes what the run prints, after what others have printed.
        prepare: called in that process first.
        seconds: kill it after this time.
    """
    child = os.fork()  # to import the trainer anew takes longer than all the rest
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)  # pytest would keep them
            prepare()
            main(arguments)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def at_call(owner: object, name: str, number: int, action: Callable[[], None], after: bool = False) -> None:
    """Do something when a function of a class or module is called for the `number`-th time, from 1."""
    function, calls = getattr(owner, name), 0

    def watched(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            action()
        result = function(*arguments, **options)
        if calls == number and after:
            action()
        return result

    setattr(owner, name, watched)


def kill_now() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_now() -> None:
    """Send this process SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
