"""Worker processes that call the command line, one run after another."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import connection
from pathlib import Path
from typing import TextIO

import torch

from mh_lightning import cli
from mh_lightning.errors import reason_of
from mh_lightning.experiments.runs import Run
from mh_lightning.threads import use_threads


def run_all(runs: Iterable[Run], workers: int, on_start: Callable[[Run], None]) -> Generator[tuple[Run, str | None]]:
    """Run all of them, and yield each as it ends, with None or one sentence on why it failed.

    The next run is taken from `runs` when a worker is free. Closing the iterator, or an exception such as that of
    Ctrl-C, kills the workers: all that a run writes is written atomically, and it can be gone on with.

    Args:
        runs: what to run.
        workers: processes, among which the cores are divided.
        on_start: told of each run before it starts.
    """
    threads = max(1, torch.get_num_threads() // workers)
    others = set(multiprocessing.active_children())
    # one pool a worker: a process that dies takes only its own run with it
    idle = [_worker(threads) for _ in range(workers)]
    busy: dict[Future[str | None], tuple[Run, ProcessPoolExecutor]] = {}
    waiting = iter(runs)
    try:
        while True:
            while idle and (run := next(waiting, None)) is not None:
                on_start(run)
                worker = idle.pop()
                busy[worker.submit(execute, run.command(), run.log, run.checkpoint())] = run, worker
            if not busy:
                return
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                run, worker = busy.pop(future)
                try:
                    error = future.result()
                except BrokenProcessPool:
                    error = "its process was killed, maybe for lack of memory"
                    worker = _worker(threads)
                idle.append(worker)
                yield run, error
    finally:
        if busy:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
        for worker in [*idle, *(worker for _, worker in busy.values())]:
            worker.shutdown(wait=not busy, cancel_futures=True)


def _worker(threads: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (threads,))


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[:1]  # LightningCLI warns of the first process's arguments
    use_threads(threads)


def _end_with_parent() -> None:
    """A pool's process outlives a killed parent, and would write into a folder that is run again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def execute(command: list[str], log: Path, checkpoint: Path | None = None) -> str | None:
    """Call the command line in this process, with its output in a file.

    Args:
        command: its arguments.
        log: the file.
        checkpoint: to go on from; one that does not fit is left aside.

    Returns:
        None, or one sentence on why it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", buffering=1) as file, _output_to(file):
        if checkpoint is not None:
            error = _call([*command, "--ckpt_path", str(checkpoint)], log)
            if error is None or not error.startswith("ckpt_path"):
                return error
        return _call(command, log)


def _call(command: list[str], log: Path) -> str | None:
    try:
        cli.main(command)
    except SystemExit:
        told = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        return told[-1].removeprefix("error: ") if told else "it ended without a word"
    except Exception as error:  # whatever it is, it is reported, and the other runs go on
        traceback.print_exc()
        return f"{type(error).__name__}: {reason_of(error)}"
    finally:
        gc.collect()  # trainers and models hold each other, and the data; the next run should not carry them
    return None


@contextmanager
def _output_to(file: TextIO) -> Iterator[None]:
    """Python's output and that of handlers and libraries, which keep the streams that they have found."""
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in kept:
            os.dup2(file.fileno(), number)
        with redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
