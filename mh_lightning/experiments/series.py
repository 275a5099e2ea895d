"""A series: every experiment with every seed and class order, and what came out."""

import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mh_lightning.errors import UserError, require
from mh_lightning.experiments.cells import Planned, check_names
from mh_lightning.experiments.progress import Progress
from mh_lightning.experiments.report import Series, write_report
from mh_lightning.experiments.runs import METRICS, Experiment, Run, read_experiment
from mh_lightning.experiments.sharing import run_shared
from mh_lightning.experiments.statistics import Key
from mh_lightning.experiments.streams import group_by_stream
from mh_lightning.experiments.tables import read_published

Found = dict[str, dict[Key, dict[str, Any]]]


def run_series(
    planned: Sequence[Planned],
    seeds: Sequence[int],
    output: Path,
    class_order_seeds: Sequence[int] = (),
    workers: int = 1,
    run_dir: Path = Path("runs"),
    baseline: str | None = None,
    metric: str = "average_accuracy",
    title: str | None = None,
    reference: Path | None = None,
    command: Sequence[str] = (),
) -> int:
    """Run what has no result yet, then write the tables and the figure.

    Runners may share a run folder: each run takes place in one of them, and all of them have its result.

    Args:
        planned: the experiments.
        seeds: of everything.
        output: folder of what is written.
        class_order_seeds: of the class order; none leaves it to the configurations.
        workers: processes.
        run_dir: folder of the run folders.
        baseline: experiment that the others are compared with, or the end of one name in each stream.
        metric: that is compared and drawn.
        title: of the table.
        reference: CSV file of published values.
        command: that the table says it was made with.

    Returns:
        How many runs failed.

    Raises:
        UserError: if an argument does not fit; nothing is run or written then.
    """
    require("--workers", workers, at_least=1)
    check_names(planned)
    if not seeds:
        raise UserError("--seeds is empty; give numbers, or ranges such as 0-9.")
    published = {} if reference is None else read_published(reference)
    orders: Sequence[int | None] = list(class_order_seeds) or [None]
    experiments = [read_experiment(one, seeds[0], orders[0]) for one in planned]
    check_metric(metric, experiments)
    streams = group_by_stream(experiments, baseline)
    for folder, option in ((output, "--output"), (run_dir, "--run_dir")):
        make_folder(folder, option)
    runs = [
        experiment.run(run_dir / experiment.name, seed, order)
        for order in orders
        for seed in seeds
        for experiment in experiments
    ]
    found, failures = _run_missing(runs, workers)
    results: Found = {experiment.name: {} for experiment in experiments}
    for run in runs:  # in the order of the command line, not in that of their ends
        if run.name in found:
            results[run.experiment][run.seed, run.order] = found[run.name]
    series = Series(title or "Results", metric, _made_by(command), tuple(streams), published, failures)
    write_report(output, series, results)
    print(f"{len(found)} of {len(runs)} runs have a result; tables and figure in {output}")
    for name, error in failures.items():
        print(f"failed: {name}: {error} (see {run_dir / name / 'log.txt'})")
    return len(failures)


def _run_missing(runs: Sequence[Run], workers: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results and errors, by the run's name."""
    found = {run.name: result for run in runs if (result := run.result()) is not None}
    missing = [run for run in runs if run.name not in found]
    print(f"{len(runs)} runs, {len(found)} of them with a result")
    failures: dict[str, str] = {}
    if not missing:
        return found, failures
    with Progress(len(missing), "runs") as progress:
        for run, error in run_shared(missing, workers, lambda run: progress.started(run.name)):
            result = run.result() if error is None else None
            if result is None:
                failures[run.name] = error or "it ended before its last task, without a complete results.json"
                progress.finished(run.name, f"{run.name}: {failures[run.name]}", failed=True)
                continue
            found[run.name] = result
            accuracy, seconds = result["average_accuracy"], result["seconds"]
            progress.finished(run.name, f"{run.name}: average accuracy {accuracy:.3f} ({seconds:.1f} s)")
    return found, failures


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option}: {str(folder)!r} cannot be made a folder ({error.strerror}); give another."
        ) from error


def check_metric(metric: str, experiments: Sequence[Experiment]) -> None:
    """Refuse what results.json will not have."""
    for experiment in experiments:
        known = (*METRICS, *experiment.extra_metrics)
        if metric not in known:
            raise UserError(f"--metric: {metric!r} is none of {', '.join(known)} of {experiment.name}.")


def _made_by(command: Sequence[str]) -> str:
    return (
        f"Made by `{_readable(command)}` with mh_lightning {_version()} and torch {torch.__version__} "
        f"on {_processor()}."
    )


def _readable(command: Sequence[str]) -> str:
    """The command, without the folders above the working folder.

    Example:
        >>> _readable(["run", "--configs", str(Path.cwd() / "a.yaml"), "/home/me/b.yaml"])
        'run --configs a.yaml b.yaml'
    """
    here = Path.cwd()
    shown = []
    for word in command:
        path = Path(word)
        if path.is_absolute():
            word = str(path.relative_to(here) if path.is_relative_to(here) else path.name)
        shown.append(word)
    return shlex.join(shown)


def _version() -> str:
    try:
        return metadata.version("mh_lightning")
    except metadata.PackageNotFoundError:
        return "from its source tree"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
