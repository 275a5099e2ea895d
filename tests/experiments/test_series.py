"""Series of real runs on the tiny stream."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mh_lightning.cli import main as fit
from mh_lightning.experiments.__main__ import main
from tests.conftest import results_of

ROOT = Path(__file__).parents[2]


def series(tmp_path: Path, *words: object) -> int:
    return main(
        ["run", "--run_dir", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), *(str(word) for word in words)]
    )


def finished(tmp_path: Path) -> dict[str, int]:
    """When each results.json was written."""
    files = sorted((tmp_path / "runs").rglob("results.json"))
    return {str(file.parent.relative_to(tmp_path / "runs")): file.stat().st_mtime_ns for file in files}


def runs_csv(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out" / "runs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def slow_config(tiny_config: Path) -> Path:
    """Like the tiny one, with more epochs."""
    slow = tiny_config.with_name("slow.yaml")
    slow.write_text(tiny_config.read_text().replace("epochs_per_task: 2", "epochs_per_task: 6"))
    return slow


@pytest.mark.usefixtures("in_process")
def test_tables_of_two_experiments(tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = tiny_config.with_name("tiny_linear.yaml")
    linear.write_text(tiny_config.read_text())
    reference = tmp_path / "published.csv"
    reference.write_text("experiment,value,source\ntiny,0.5,Doe 2024\n")
    assert series(tmp_path, "--configs", tiny_config, linear, "--seeds", "0-1", "--baseline", "tiny_linear",
                  "--class_order_seeds", "7", "--reference", reference, "--title", "Two heads",
                  "--overrides", "--trainer.enable_checkpointing=false") == 0  # fmt: skip
    assert "[4/4 runs] tiny_linear/seed_1_order_7: average accuracy" in capsys.readouterr().out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"table.md", "experiments.csv", "runs.csv", "figure.png"}
    table = (out / "table.md").read_text()
    assert table.startswith("# Two heads\n")
    assert "50.0 (Doe 2024)" in table
    assert "+0.0 ± 0.0" in table  # the same configuration under two names
    assert "over 4 runs" in table
    assert str(tmp_path) not in table
    folder = tmp_path / "runs" / "tiny" / "seed_1_order_7"
    assert "average accuracy" in (folder / "log.txt").read_text()
    line = next(run for run in runs_csv(tmp_path) if (run["experiment"], run["seed"]) == ("tiny", "1"))
    assert line["class_order_seed"] == "7"
    assert float(line["average_accuracy"]) == results_of(folder / "version_0")["average_accuracy"]


@pytest.mark.usefixtures("in_process")
def test_only_what_has_no_result_is_run(tmp_path: Path, tiny_config: Path) -> None:
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0) == 0
    first = finished(tmp_path)
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0, 1, "--overrides", "trainer.profiler=simple") == 0
    second = finished(tmp_path)
    assert second.keys() == {"tiny/seed_0/version_0", "tiny/seed_1/version_0"}
    assert second.items() >= first.items()
    # another learning rate is another configuration, and the old results are not mixed with the new ones
    override = "model.init_args.optimizer.init_args.lr=0.0"
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0, "--overrides", override) == 0
    assert finished(tmp_path).keys() - second.keys() == {"tiny/seed_0/version_1"}
    (line,) = runs_csv(tmp_path)
    changed = results_of(tmp_path / "runs" / "tiny" / "seed_0" / "version_1")
    assert float(line["average_accuracy"]) == changed["average_accuracy"]
    assert changed != results_of(tmp_path / "runs" / "tiny" / "seed_0" / "version_0")


@pytest.mark.usefixtures("in_process")
def test_a_run_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tiny_config.with_name("wrong.yaml")
    wrong.write_text(tiny_config.read_text().replace("increment: 2", "increment: 99"))
    assert series(tmp_path, "--configs", wrong, tiny_config, "--seeds", 0) == 1
    told = capsys.readouterr().out
    assert "1 of 2 runs have a result" in told
    assert "failed: wrong/seed_0: " in told
    assert "increment" in told.split("failed: wrong/seed_0: ")[1]
    assert "- wrong/seed_0: " in (tmp_path / "out" / "table.md").read_text()
    assert [line["experiment"] for line in runs_csv(tmp_path)] == ["tiny"]


@pytest.mark.usefixtures("in_process")
def test_killed_series_goes_on_where_it_was(tmp_path: Path, slow_config: Path) -> None:
    words = ["--configs", slow_config, "--seeds", "0-1"]
    command = [sys.executable, "-m", "mh_lightning.experiments", "run", "--run_dir", tmp_path / "runs",
               "--output", tmp_path / "out", *words]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    begun = tmp_path / "runs" / "slow" / "seed_1" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not begun.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(tmp_path)
    assert before.keys() == {"slow/seed_0/version_0"}
    time.sleep(0.5)  # the worker ends with its parent
    assert series(tmp_path, *words) == 0
    after = finished(tmp_path)
    assert after.items() >= before.items()
    # the second run was gone on with
    assert after.keys() == {"slow/seed_0/version_0", "slow/seed_1/version_1"}
    configuration = yaml.safe_load((tmp_path / "runs" / "slow" / "seed_1" / "version_1" / "config.yaml").read_text())
    assert configuration["ckpt_path"] == str(begun)
    fit(["fit", "--config", str(slow_config), "--seed_everything", "1", "--run_dir", str(tmp_path / "alone")])
    resumed = results_of(tmp_path / "runs" / "slow" / "seed_1" / "version_1")
    assert resumed == results_of(tmp_path / "alone" / "slow" / "version_0")


@pytest.mark.usefixtures("in_process")
def test_incomplete_results_and_unfit_checkpoints_do_not_count(tmp_path: Path, tiny_config: Path) -> None:
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0) == 0
    version = tmp_path / "runs" / "tiny" / "seed_0" / "version_0"
    whole: dict[str, Any] = json.loads((version / "results.json").read_text())
    (version / "results.json").write_text(json.dumps(whole | {"tasks_trained": 1}))
    (version / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0) == 0
    (line,) = runs_csv(tmp_path)
    assert float(line["average_accuracy"]) == whole["average_accuracy"]
    assert "tiny/seed_0/version_1" in finished(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "9-0"], ["--seeds", "'9-0'"]),
        (["--seeds", "0", "--metric", "accuracy"], ["--metric", "'accuracy'", "average_accuracy"]),
        (["--seeds", "0", "--workers", "0"], ["--workers", "0"]),
        (["--seeds", "0", "--overrides", "seed_everything=4"], ["--overrides", "seed_everything"]),
        (["--seeds", "0", "--overrides", "data.init_args.increments=4"], ["increments"]),
        (["--seeds", "0", "--overrides", "trainer.devices=2"], ["devices", "2"]),
        (["--seeds", "0", "--baseline", "other"], ["--baseline", "'other'"]),
        (["--seeds", "0", "--reference", "missing.csv"], ["--reference", "missing.csv"]),
        (["--seeds", "0", "--workers", "two"], ["workers"]),
        (["--seed", "0"], ["seed"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: list[str]
) -> None:
    assert series(tmp_path, "--configs", tiny_config, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in told), errors[0]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()
