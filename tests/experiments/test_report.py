"""Tables that are written again, with nothing run."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mh_lightning.experiments import report
from mh_lightning.experiments.__main__ import main
from mh_lightning.experiments.report import Series, write_report
from mh_lightning.experiments.streams import Stream
from mh_lightning.experiments.tables import Published
from tests.experiments.test_tables import RESULTS, STREAM

DOCS = Path(__file__).parents[2] / "docs"
SERIES = Series("All", "average_accuracy", "Made by hand.", (STREAM,), {"blobs_heads": Published(0.7, "Doe, “2024”")},
                {"blobs_new/seed_0": "the loss became NaN"})  # fmt: skip


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "series_figure", lambda *_: Figure(figsize=(1, 1)))


def test_tables_are_written_again_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, SERIES, RESULTS)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written.keys() == {"series.json", "runs.csv", "experiments.csv", "figure.png", "table.md"}
    for name in ("experiments.csv", "figure.png", "table.md"):
        (tmp_path / name).unlink()
    assert main(["tables", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    table = (tmp_path / "table.md").read_text()
    assert all(text in table for text in ("# All", "Made by hand.", "70.0 (Doe, “2024”)", "the loss became NaN"))
    # they follow from runs.csv, and nothing else
    rows = list(csv.DictReader(io.StringIO(written["runs.csv"].decode())))
    assert (rows[0]["experiment"], rows[0]["average_accuracy"]) == ("blobs_tuning", "0.2")
    rows[0]["average_accuracy"] = "0.5"
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["tables", str(tmp_path)]) == 0
    assert "| blobs_tuning | 40.0 ± 24.8 |" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("runs.csv", "forgetting", "forgetfulness", "columns"),
        ("runs.csv", "blobs_heads,1,", "blobs_heads,0,", "two runs"),
        ("runs.csv", "blobs_heads", "blobs_hats", "no stream has blobs_hats"),
        ("series.json", "average_accuracy", "accuracy", "metric"),
        ("series.json", "made_by", "maker", "maker"),
        ("series.json", "{", "", "needs the series.json"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, told: str
) -> None:
    write_report(tmp_path, SERIES, RESULTS)
    (tmp_path / "table.md").unlink()
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    assert main(["tables", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: tables: {str(tmp_path)!r}")
    assert told in line
    assert not (tmp_path / "table.md").exists()


def test_a_folder_without_a_series_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", str(tmp_path)]) == 2
    assert "run the series again" in capsys.readouterr().err


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("folder", sorted(path.parent.relative_to(DOCS) for path in DOCS.rglob("runs.csv")), ids=str)
def test_published_tables_follow_from_their_runs(tmp_path: Path, folder: Path) -> None:
    for name in ("series.json", "runs.csv"):
        shutil.copy(DOCS / folder / name, tmp_path)
    assert main(["tables", str(tmp_path)]) == 0
    for name in ("experiments.csv", "table.md"):
        assert (tmp_path / name).read_text() == (DOCS / folder / name).read_text(), f"run tables on {folder}"


def test_a_series_can_be_read_as_json(tmp_path: Path) -> None:
    write_report(tmp_path, Series("All", "forgetting", "", (Stream("blobs", ("blobs_tuning",)),)), {})
    content = json.loads((tmp_path / "series.json").read_text())
    assert content["streams"] == [{"title": "blobs", "experiments": ["blobs_tuning"], "baseline": None}]
