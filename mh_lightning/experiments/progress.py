"""How far a series has come: a bar on a terminal, a line a run elsewhere."""

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class Progress:
    """Counts what is done and names what is running.

    Args:
        total: what there is to do.
        unit: what it is called.
        console: where to show it, by default standard output.

    Example:
        >>> import sys
        >>> with Progress(2, "runs", Console(file=sys.stdout, force_terminal=False)) as shown:
        ...     shown.started("a/seed_0")
        ...     shown.finished("a/seed_0", "a/seed_0: average accuracy 0.5")
        [1/2 runs] a/seed_0: average accuracy 0.5
    """

    def __init__(self, total: int, unit: str, console: Console | None = None) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self.console = console or Console(soft_wrap=True)
        self._running: list[str] = []
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit),
            progress.TimeElapsedColumn(),
            progress.TextColumn("remaining"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600,  # runs are long
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, name: str) -> None:
        """Name what is running."""
        self._running.append(name)
        self._show()

    def finished(self, name: str, told: str | None, failed: bool = False, done: int | None = None) -> None:
        """Count what has ended; on a terminal, tell only of failures.

        Args:
            name: what has ended.
            told: what is to be said of it, if anything.
            failed: whether it failed.
            done: how much is done now, by default one more.
        """
        self._running.remove(name)
        self.done = self.done + 1 if done is None else done
        self._show()
        if told and (failed or not self.console.is_terminal):
            self.console.print(f"[{self.done}/{self.total} {self.unit}] {told}", markup=False, highlight=False)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, description=", ".join(self._running))
