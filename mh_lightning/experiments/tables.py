"""What a series has found: a table to read, and two to compute with."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mh_lightning.errors import UserError
from mh_lightning.experiments.runs import METRICS
from mh_lightning.experiments.statistics import Interval, Key, mean_interval, paired_difference
from mh_lightning.experiments.streams import Stream

Results = Mapping[str, Mapping[Key, Mapping[str, Any]]]  # results.json of each experiment's runs
SHOWN = ("average_accuracy", "forgetting", "backward_transfer", "all_pairs_backward_transfer", "last_accuracy",
         "incremental_accuracy")  # fmt: skip
COSTS = {"samples_per_second": ("samples/s", 1.0), "state_bytes": ("state (MB)", 1e-6),
         "peak_memory_bytes": ("peak memory (MB)", 1e-6)}  # column and unit  # fmt: skip
NUMBERS = (*METRICS, "seconds", *COSTS)
RUN_COLUMNS = ["experiment", "seed", "class_order_seed"]
ONE_VALUE = "one value"  # of all runs, or of the only one: no interval


@dataclass(frozen=True)
class Published:
    """A value that others have reported."""

    value: float
    source: str


@dataclass(frozen=True)
class Summary:
    """An experiment's runs in numbers.

    Args:
        experiment: its name.
        numbers: mean and interval of each metric and of the seconds; empty without a run.
        difference: of the chosen metric to the baseline, over the runs that have the same seed and class order.
        published: a reported value of the chosen metric.
    """

    experiment: str
    numbers: dict[str, Interval]
    difference: Interval | None = None
    published: Published | None = None

    @property
    def runs(self) -> int:
        """How many have a result."""
        return max((interval.runs for interval in self.numbers.values()), default=0)


def summarise(stream: Stream, results: Results, metric: str, published: Mapping[str, Published]) -> list[Summary]:
    """One summary for each experiment of a stream, in its order.

    Args:
        stream: the experiments.
        results: of all experiments, by seed and class order.
        metric: compared with the baseline.
        published: by experiment.
    """

    def values(experiment: str, name: str) -> dict[Key, float]:
        found = {key: _number(result, name) for key, result in results.get(experiment, {}).items()}
        return {key: value for key, value in found.items() if value is not None}

    summaries = []
    for experiment in stream.experiments:
        names = numbers_with(metric)
        numbers = {name: mean_interval(found) for name in names if (found := values(experiment, name))}
        difference = None
        if stream.baseline not in (None, experiment):
            difference = paired_difference(values(experiment, metric), values(str(stream.baseline), metric))
        summaries.append(Summary(experiment, numbers, difference, published.get(experiment)))
    return summaries


def numbers_with(metric: str) -> tuple[str, ...]:
    """The columns of tables; a metric of one's own comes last."""
    return NUMBERS if metric in NUMBERS else (*NUMBERS, metric)


def _number(result: Mapping[str, Any], name: str) -> float | None:
    """A metric or a cost of a run, where it has it: not each stream has all, and what is NaN or infinite is none. The
    interval of the others tells how many they are.
    """
    value = result.get("cost", {}).get(name) if name in COSTS else result.get(name)
    return None if value is None or not math.isfinite(float(value)) else float(value)


def read_published(path: Path) -> dict[str, Published]:
    """Reported values, from a CSV file with the columns experiment, value and source.

    Raises:
        UserError: if it cannot be read, lacks a column, or a value is no fraction as those of results.json are.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--reference: {str(path)!r} cannot be read; give a CSV file.") from error
    published = {}
    for line, row in enumerate(rows, start=2):
        try:
            value = float(row["value"])
            published[row["experiment"]] = Published(value, row["source"] or "")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--reference: line {line} of {str(path)!r} needs the columns experiment, value (a number) and source."
            ) from error
        if not -1 <= value <= 1:
            raise UserError(
                f"--reference: line {line} of {str(path)!r} has the value {value}; give a fraction such as 0.785."
            )
    return published


def markdown_table(summaries: Sequence[Summary], metric: str, baseline: str | None) -> str:
    """One stream's table, in per cent; differences whose interval excludes 0 are bold, and without one none is.

    Args:
        summaries: its rows.
        metric: with its interval, in the first column.
        baseline: that the differences are to.

    Example:
        >>> numbers = {name: Interval(0.5, 0.02, 3, seeds=3) for name in NUMBERS if name not in COSTS}
        >>> for line in markdown_table([Summary("replay", numbers)], "last_accuracy", None).splitlines():
        ...     print(line[:64])
        | experiment | last accuracy | average accuracy | forgetting | b
        |---|---|---|---|---|---|---|---|---|---|
        | replay | 50.0 ± 2.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 0.5 |
    """
    others = [name for name in SHOWN if name != metric and any(name in summary.numbers for summary in summaries)]
    header = ["experiment", *(name.replace("_", " ") for name in (metric, *others)), "seconds"]
    costs = {name: column for name, column in COSTS.items() if any(name in summary.numbers for summary in summaries)}
    header += [*(title for title, _ in costs.values()), "runs", "counted as"]
    with_published = any(summary.published for summary in summaries)
    header += [f"difference to {baseline}"] * bool(baseline) + ["published"] * with_published
    lines = [header, ["---"] * len(header)]
    for summary in summaries:
        numbers = summary.numbers
        cells = [summary.experiment, _interval(numbers.get(metric))]
        cells += [f"{100 * numbers[name].mean:.1f}" if name in numbers else "" for name in others]
        cells.append(f"{numbers['seconds'].mean:.1f}" if numbers else "")
        cells += [_three_digits(numbers[name].mean * unit) if name in numbers else ""
                  for name, (_, unit) in costs.items()]  # fmt: skip
        cells += [str(summary.runs), _counted_as(numbers.get(metric))]
        if baseline:
            difference = _interval(summary.difference, signed=True)
            cells.append(f"**{difference}**" if summary.difference and summary.difference.excludes_zero else difference)
        if with_published:
            reported = summary.published
            cells.append(f"{100 * reported.value:.1f} ({reported.source})" if reported else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _interval(interval: Interval | None, signed: bool = False) -> str:
    """In per cent, with as many digits as it takes to show that a half-width is not 0."""
    if interval is None:
        return ""
    sign, half_width = "+" if signed else "", 100 * (interval.half_width or 0)
    if not half_width:
        return f"{100 * interval.mean:{sign}.1f} ({ONE_VALUE})"
    digits = max(1, math.ceil(-math.log10(half_width)))
    return f"{100 * interval.mean:{sign}.{digits}f} ± {half_width:.{digits}f}"


def _counted_as(interval: Interval | None) -> str:
    """Which runs are not equal by construction.

    Example:
        >>> _counted_as(Interval(0.5, 0.1, 25, seeds=5, orders=5)), _counted_as(Interval(0.5, 0.1, 25, orders=5))
        ('5 seeds × 5 orders', '5 orders')
    """
    if interval is None:
        return ""
    factors = {"seeds": interval.seeds, "orders": interval.orders}
    return " × ".join(f"{number} {name}" for name, number in factors.items() if number > 1) or ONE_VALUE


def experiments_csv(streams: Sequence[Stream], summaries: Sequence[Sequence[Summary]], metric: str) -> str:
    """A line an experiment, unrounded; half-widths are those of the 95% intervals, and empty where all runs are equal.

    Seeds and orders are how many of them count in the interval of the metric, or of its difference (`pair_...`): 1 for
    what makes no difference.

    Args:
        streams: the groups.
        summaries: of each of them.
        metric: that differences and published values are of.
    """
    columns = ["stream", "experiment", "runs", "seeds", "orders"]
    for name in numbers_with(metric):
        columns += [name, f"{name}_half_width"]
    columns += ["baseline", f"{metric}_difference", f"{metric}_difference_half_width", "pairs"]
    columns += ["pair_seeds", "pair_orders", f"{metric}_published", "source"]
    lines: list[Sequence[object]] = [columns]
    for stream, rows in zip(streams, summaries, strict=True):
        for row in rows:
            counted = row.numbers[metric][3:] if metric in row.numbers else (None, None)
            line: list[object] = [stream.title, row.experiment, row.runs, *counted]
            for name in numbers_with(metric):
                line += list(row.numbers[name][:2]) if name in row.numbers else [None, None]
            line += [stream.baseline, *(row.difference or [None] * 5)]
            line += [row.published.value, row.published.source] if row.published else [None, None]
            lines.append(line)
    return _csv(lines)


def runs_csv(results: Results, metric: str = METRICS[0]) -> str:
    """A line a run, with its metrics.

    Args:
        results: of all experiments, by seed and class order.
        metric: one that has a column, too, if it is one's own.

    Example:
        >>> result = {name: 0.5 for name in NUMBERS}
        >>> print(runs_csv({"replay": {(0, None): result}}).splitlines()[1][:20])
        replay,0,,0.5,0.5,0.
    """
    names = numbers_with(metric)
    lines: list[Sequence[object]] = [[*RUN_COLUMNS, *names]]
    for experiment, runs in results.items():
        lines += [[experiment, *key, *(_number(result, name) for name in names)] for key, result in runs.items()]
    return _csv(lines)


def read_runs(text: str, metric: str = METRICS[0]) -> dict[str, dict[Key, dict[str, Any]]]:
    r"""The results that a runs.csv holds.

    Raises:
        ValueError: if it has columns or values that `runs_csv` does not write, or a run twice.

    Example:
        >>> read_runs("experiment,seed,class_order_seed,last_accuracy\nreplay,0,7,0.5\n")
        {'replay': {(0, 7): {'last_accuracy': 0.5, 'cost': {}}}}
    """
    rows = csv.DictReader(io.StringIO(text))
    names = list(rows.fieldnames or [])
    numbers = numbers_with(metric)
    if names[:3] != RUN_COLUMNS or not set(names[3:]) <= set(numbers):
        raise ValueError(f"its columns should be {', '.join(RUN_COLUMNS)}, and then some of {', '.join(numbers)}")
    results: dict[str, dict[Key, dict[str, Any]]] = {}
    for row in rows:
        key = int(row["seed"]), int(row["class_order_seed"]) if row["class_order_seed"] else None
        found = {name: float(row[name]) for name in names[3:] if row[name]}
        runs = results.setdefault(row["experiment"], {})
        if key in runs:
            raise ValueError(f"{row['experiment']} has two runs with seed and class order {key}")
        runs[key] = {name: value for name, value in found.items() if name not in COSTS}
        runs[key]["cost"] = {name: value for name, value in found.items() if name in COSTS}
    return results


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
