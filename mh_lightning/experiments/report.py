"""The folder of what a series has found: two files that say it, and the tables and the figure that follow from them."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mh_lightning.errors import UserError, reason_of
from mh_lightning.experiments.figures import series_figure
from mh_lightning.experiments.streams import Stream
from mh_lightning.experiments.tables import (
    Published,
    Results,
    experiments_csv,
    markdown_table,
    read_runs,
    runs_csv,
    summarise,
)
from mh_lightning.files import as_a_whole

SERIES, RUNS = "series.json", "runs.csv"


@dataclass(frozen=True)
class Series:
    """What the tables say beside the numbers of runs.csv.

    Args:
        title: of the tables and the figure.
        metric: that is compared and drawn.
        made_by: the sentence on the command, the versions and the machine that made the runs.
        streams: the groups of experiments.
        published: reported values, by experiment.
        failures: errors, by run.
    """

    title: str
    metric: str
    made_by: str
    streams: tuple[Stream, ...]
    published: Mapping[str, Published] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: Path, series: Series, results: Results) -> None:
    """Write series.json and runs.csv, and what follows from them.

    Args:
        folder: that exists.
        series: titles, groups and origin.
        results: of all experiments, by seed and class order.
    """
    write_file(folder / SERIES, json.dumps(asdict(series), indent=1, ensure_ascii=False) + "\n")
    write_file(folder / RUNS, runs_csv(results, series.metric))
    _write_tables(folder, series, results)


def _write_tables(folder: Path, series: Series, results: Results) -> None:
    """Write experiments.csv, figure.png and table.md."""
    summaries = [summarise(stream, results, series.metric, series.published) for stream in series.streams]
    write_file(folder / "experiments.csv", experiments_csv(series.streams, summaries, series.metric))
    picture = io.BytesIO()
    series_figure(series.streams, summaries, series.metric, series.title).savefig(picture, dpi=150)
    write_file(folder / "figure.png", picture.getvalue())
    parts = [f"# {series.title}", "![Means and 95% intervals](figure.png)"]
    for stream, rows in zip(series.streams, summaries, strict=True):
        parts += [f"## {stream.title}", markdown_table(rows, series.metric, stream.baseline)]
    parts.append(
        f"In per cent, means over {sum(map(len, results.values()))} runs in all; ± is the half-width of the 95% "
        "interval over the seeds and class orders that the runs count as: what makes no difference is not counted, and "
        "one value has no interval."
        + (" Differences are paired by seed and class order, **bold** where their interval excludes 0."
           if any(stream.baseline for stream in series.streams) else "")
    )  # fmt: skip
    if series.failures:
        failures = [f"- {name}: {error}" for name, error in series.failures.items()]
        parts.append("\n".join(["Without a result:", "", *failures]))
    parts.append(series.made_by)
    write_file(folder / "table.md", "\n\n".join(parts) + "\n")


def rebuild_report(folder: Path) -> None:
    """Write the tables and the figure again, from series.json and runs.csv; nothing is run.

    Raises:
        UserError: if one of both is missing or damaged.
    """
    try:
        series = _series(json.loads((folder / SERIES).read_text(encoding="utf-8")))
        results = read_runs((folder / RUNS).read_text(encoding="utf-8"), series.metric)
        strangers = results.keys() - {name for stream in series.streams for name in stream.experiments}
        if strangers:
            raise ValueError(f"no stream has {min(strangers)}")
        if not any(series.metric in run for runs in results.values() for run in runs.values()):
            raise ValueError(f"no run has its metric {series.metric!r}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(
            f"tables: {str(folder)!r} needs the {SERIES} and {RUNS} that run has written ({reason_of(error)}); give "
            "such a folder, or run the series again."
        ) from error
    _write_tables(folder, series, results)


def _series(content: dict[str, Any]) -> Series:
    streams = tuple(Stream(**one | {"experiments": tuple(one["experiments"])}) for one in content["streams"])
    published = {name: Published(**one) for name, one in content["published"].items()}
    return Series(**content | {"streams": streams, "published": published})


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all; of several processes that do, the last one's stays."""
    with as_a_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
