import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer

from mh_lightning.errors import UserError
from mh_lightning.experiments.figures import series_figure
from mh_lightning.experiments.statistics import Key
from mh_lightning.experiments.streams import Stream
from mh_lightning.experiments.tables import (
    NUMBERS,
    Published,
    experiments_csv,
    markdown_table,
    read_published,
    read_runs,
    runs_csv,
    summarise,
)


def result(accuracy: float) -> dict[str, Any]:
    return dict.fromkeys(NUMBERS, 0.25) | {"average_accuracy": accuracy, "seconds": 2.0}


STREAM = Stream("blobs (TensorFile)", ("blobs_tuning", "blobs_heads", "blobs_new"), "blobs_tuning")
RESULTS = {
    "blobs_tuning": {(0, None): result(0.2), (1, None): result(0.3), (2, None): result(0.4)},
    "blobs_heads": {(0, None): result(0.7), (1, None): result(0.8), (2, None): result(0.901)},
    "blobs_new": {},
}


def rows() -> Any:
    return summarise(STREAM, RESULTS, "average_accuracy", {"blobs_heads": Published(0.777, "Doe 2024")})


def test_markdown_table_in_full() -> None:
    # mean 0.3 ± 4.3027 * 0.1 / sqrt(3) = 0.2484; differences 0.5, 0.5, 0.501: 0.5003 ± 4.3027 * 0.00057735 / sqrt(3)
    assert markdown_table(rows(), "average_accuracy", "blobs_tuning").splitlines() == [
        "| experiment | average accuracy | forgetting | backward transfer | all pairs backward transfer "
        "| last accuracy | incremental accuracy | seconds | runs | counted as "
        "| difference to blobs_tuning | published |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| blobs_tuning | 30.0 ± 24.8 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 2.0 | 3 | 3 seeds |  |  |",
        "| blobs_heads | 80.0 ± 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 2.0 | 3 | 3 seeds | **+50.0 ± 0.1** "
        "| 77.7 (Doe 2024) |",
        "| blobs_new |  |  |  |  |  |  |  | 0 |  |  |  |",
    ]


CROSSED: dict[str, dict[Key, dict[str, Any]]] = {  # of two seeds and three class orders
    "blobs_mean": {(seed, order): result(0.5) for seed in (0, 1) for order in (0, 1, 2)},
    "blobs_fixed": {(seed, order): result(0.75) for seed in (0, 1) for order in (0, 1, 2)},
    "blobs_heads": {(seed, order): result(0.5 + seed / 10) for seed in (0, 1) for order in (0, 1, 2)},
    "blobs_close": {(seed, order): result(0.6 + order / 10_000) for seed in (0, 1) for order in (0, 1, 2)},
    "blobs_both": {(seed, order): result(0.5 + seed / 10 + order / 5) for seed in (0, 1) for order in (0, 1)},
}
CROSSED_STREAM = Stream("blobs (TensorFile)", tuple(CROSSED), "blobs_mean")


def test_runs_that_are_equal_by_construction_count_once() -> None:
    # .1 between two seeds: ± .05 * 12.7062 = .635; .0001 between orders: ± 4.30265 * .0001 / sqrt(3) = .000248
    # both: ± 12.7062 * sqrt(.05² + .1²) = 1.4206
    summaries = summarise(CROSSED_STREAM, CROSSED, "average_accuracy", {})
    lines = markdown_table(summaries, "average_accuracy", "blobs_mean").splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [[row[1], *row[-3:]] for row in cells] == [
        ["50.0 (one value)", "6", "one value", ""],
        ["75.0 (one value)", "6", "one value", "+25.0 (one value)"],  # not bold: no interval excludes 0
        ["55.0 ± 63.5", "6", "2 seeds", "+5.0 ± 63.5"],
        ["60.01 ± 0.02", "6", "3 orders", "**+10.01 ± 0.02**"],
        ["65.0 ± 142.1", "4", "2 seeds × 2 orders", "+15.0 ± 142.1"],
    ]
    table = list(csv.DictReader(io.StringIO(experiments_csv([CROSSED_STREAM], [summaries], "average_accuracy"))))
    counts = [
        [row[name] for name in ("runs", "seeds", "orders", "pairs", "pair_seeds", "pair_orders")] for row in table
    ]
    assert counts == [
        ["6", "1", "1", "", "", ""],
        ["6", "1", "1", "6", "1", "1"],
        ["6", "2", "1", "6", "2", "1"],
        ["6", "1", "3", "6", "1", "3"],
        ["4", "2", "2", "4", "2", "2"],
    ]
    assert [row["average_accuracy_half_width"] == "" for row in table] == [True, True, False, False, False]
    (panel,) = series_figure([CROSSED_STREAM], [summaries], "average_accuracy", "All").get_axes()
    bars = [container.has_xerr for container in panel.containers if isinstance(container, ErrorbarContainer)]
    assert bars == [False, False, True, True, True]


def test_runs_csv_can_be_read_again() -> None:
    assert markdown_table(summarise(CROSSED_STREAM, read_runs(runs_csv(CROSSED)), "average_accuracy", {}),
                          "average_accuracy", None) == markdown_table(
        summarise(CROSSED_STREAM, CROSSED, "average_accuracy", {}), "average_accuracy", None)  # fmt: skip
    costs = {"a": {(0, None): result(0.5) | {"cost": {"state_bytes": 8.0}}}}
    assert runs_csv(read_runs(runs_csv(costs))) == runs_csv(costs)


def test_metric_that_one_experiment_does_not_have() -> None:
    metric, few = "last_accuracy_top5", result(0.5)
    del few[metric]  # a stream of five classes
    results = {"blobs_tuning": {(0, None): few}, "blobs_heads": {(0, None): result(0.5)}, "blobs_new": {}}
    summaries = summarise(STREAM, results, metric, {})
    lines = markdown_table(summaries, metric, "blobs_tuning").splitlines()
    assert lines[0].startswith("| experiment | last accuracy top5 | average accuracy |")
    assert lines[2].startswith("| blobs_tuning |  | 50.0 |") and lines[3].startswith(
        "| blobs_heads | 25.0 (one value) | 50.0 |"
    )
    assert [row[metric] for row in csv.DictReader(io.StringIO(runs_csv(results)))] == ["", "0.25"]
    assert [row[metric] for row in csv.DictReader(io.StringIO(experiments_csv([STREAM], [summaries], metric)))] == [
        "",
        "0.25",
        "",
    ]
    (panel,) = series_figure([STREAM], [summaries], metric, "Top 5").get_axes()
    assert len(panel.containers) == 1


def test_a_value_that_is_no_number_is_left_out_and_not_counted() -> None:
    runs = {(0, None): result(0.5), (1, None): result(0.6), (2, None): result(0.7) | {"average_accuracy": math.nan}}
    (summary,) = summarise(Stream("blobs", ("a",)), {"a": runs}, "average_accuracy", {})
    assert summary.numbers["average_accuracy"].runs == 2 and summary.numbers["forgetting"].runs == 3
    assert summary.numbers["average_accuracy"].mean == pytest.approx(0.55)


def test_results_without_the_plain_transfers_have_no_column_of_them() -> None:
    kept = {name: value for name, value in result(0.5).items() if name not in ("backward_transfer", "forgetting")}
    summaries = summarise(Stream("blobs", ("a",)), {"a": {(0, None): kept}}, "average_accuracy", {})
    header, _, line = markdown_table(summaries, "average_accuracy", None).splitlines()
    assert "| average accuracy | all pairs backward transfer | last accuracy |" in header
    assert len(header.split("|")) == len(line.split("|"))


def test_csv_tables_are_unrounded() -> None:
    lines = list(csv.DictReader(io.StringIO(experiments_csv([STREAM], [rows()], "average_accuracy"))))
    assert [(line["runs"], line["seeds"], line["orders"]) for line in lines] == [("3", "3", "1")] * 2 + [("0", "", "")]
    heads = lines[1]
    assert float(heads["average_accuracy"]) == pytest.approx(2.401 / 3, abs=1e-15)
    assert float(heads["average_accuracy_difference"]) == pytest.approx(1.501 / 3, abs=1e-15)
    assert (heads["pairs"], heads["average_accuracy_published"], heads["source"]) == ("3", "0.777", "Doe 2024")
    runs = list(csv.DictReader(io.StringIO(runs_csv(RESULTS))))
    assert [(run["experiment"], run["seed"], run["average_accuracy"]) for run in runs][3:5] == [
        ("blobs_heads", "0", "0.7"),
        ("blobs_heads", "1", "0.8"),
    ]


def test_figure_has_a_panel_a_stream_and_a_point_a_result() -> None:
    other = Stream("moons (TensorFile)", ("blobs_heads",))
    figure = series_figure([STREAM, other], [rows(), rows()[1:2]], "average_accuracy", "All")
    panels = figure.get_axes()
    assert [panel.get_title(loc="left") for panel in panels] == ["blobs (TensorFile)", "moons (TensorFile)"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["tuning", "heads", "new"]
    assert len(panels[0].containers) == 2  # one has no result


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experiment,value\na,0.5\n", ["line 2", "source"]),
        ("experiment,value,source\na,0.5,b\nc,high,d\n", ["line 3", "a number"]),
        ("experiment,value,source\na,77.5,b\n", ["line 2", "77.5", "fraction"]),
    ],
)
def test_published_values_that_do_not_fit_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "published.csv"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_published(path)
    assert all(word in str(refused.value) for word in ["--reference", *words])
