"""Series of real runs on the tiny stream."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from mh_lightning.cli import main as fit
from mh_lightning.cli import resolved_configuration
from mh_lightning.experiments import sharing, workers
from mh_lightning.experiments.__main__ import main
from mh_lightning.experiments.runs import METRICS
from tests.conftest import results_of
from tests.experiments.conftest import InProcess

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
    assert {path.name for path in out.iterdir()} == {
        "table.md", "experiments.csv", "runs.csv", "figure.png", "series.json",
    }  # fmt: skip
    table = (out / "table.md").read_text()
    assert table.startswith("# Two heads\n")
    assert "50.0 (Doe 2024)" in table
    assert "| +0.0 (one value) |" in table  # the same configuration under two names
    assert "± 0.0" not in table
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


def made_up(log: Path, configuration: dict[str, Any], command: list[str], *_: object) -> str | None:
    """A run that writes down its process and name, and has a result; the first one with seed 2 fails."""
    place = Path(command[command.index("--run_dir") + 1]) / command[command.index("--experiment") + 1]
    seed = int(place.name.removeprefix("seed_"))
    with log.open("a") as file:
        file.write(f"{os.getpid()} {place.name}\n")
    if seed == 2 and not (place / "failed").exists():
        (place / "failed").touch()
        return "the loss became NaN"
    (place / "version_0").mkdir(parents=True)  # one that is there already is another runner's
    (place / "version_0" / "config.yaml").write_text(yaml.safe_dump(configuration | {"seed_everything": seed}))
    numbers = dict.fromkeys(METRICS, seed / 10) | {"seconds": 1.0}
    (place / "version_0" / "results.json").write_text(json.dumps(numbers))
    return None


def slowly(run: Callable[..., str | None], *arguments: object) -> str | None:
    time.sleep(0.1)
    return run(*arguments)


def runner(execute: Callable[..., str | None], words: list[str]) -> None:
    """A process of its own that runs a series."""
    sys.argv = ["run"]
    workers.ProcessPoolExecutor = InProcess  # type: ignore[assignment,misc]
    workers.execute = partial(slowly, execute)
    sharing.PAUSE = 0.05
    raise SystemExit(main(words))


def test_two_runners_on_one_output_share_the_runs(tmp_path: Path, tiny_config: Path) -> None:
    words = ["run", "--configs", str(tiny_config), "--run_dir", str(tmp_path / "runs"), "--output",
             str(tmp_path / "out"), "--seeds", "2", "10-15"]  # fmt: skip
    execute = partial(made_up, tmp_path / "log.txt", resolved_configuration(["--config", str(tiny_config)]))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=runner, args=(execute, words)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    runs = [line.split() for line in (tmp_path / "log.txt").read_text().splitlines()]
    # each once, but for the one that failed, which the other runner has tried
    assert sorted(name for _, name in runs) == ["seed_10", "seed_11", "seed_12", "seed_13", "seed_14", "seed_15",
                                                "seed_2", "seed_2"]  # fmt: skip
    assert len({process for process, name in runs if name == "seed_2"}) == 2
    assert sorted(process.exitcode or 0 for process in processes) == [0, 1]
    accuracies = [line["average_accuracy"] for line in runs_csv(tmp_path)]
    assert accuracies[-6:] == ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"]
    assert not list((tmp_path / "out").glob(".*"))  # nothing half written


@pytest.mark.usefixtures("in_process")
def test_a_run_that_another_runner_is_at_is_waited_for(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = partial(made_up, tmp_path / "log.txt", resolved_configuration(["--config", str(tiny_config)]))
    monkeypatch.setattr(workers, "execute", execute)
    folder = tmp_path / "runs" / "tiny" / "seed_0"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire()

    def other_ends(seconds: float) -> None:
        assert (tmp_path / "log.txt").read_text().split()[1::2] == ["seed_1"]  # what is free goes first
        execute(["fit", "--run_dir", str(folder.parent), "--experiment", folder.name])
        lock.release()

    monkeypatch.setattr(sharing.time, "sleep", other_ends)
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0, 1) == 0
    assert (tmp_path / "log.txt").read_text().split()[1::2] == ["seed_1", "seed_0"]
    assert [line["seed"] for line in runs_csv(tmp_path)] == ["0", "1"]
    assert "[2/2 runs] tiny/seed_0: average accuracy 0.000" in capsys.readouterr().out


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


@pytest.mark.usefixtures("in_process")
def test_a_metric_of_ones_own(tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "mh_lightning.callbacks.ContinualMetrics",
                "init_args": {"extra": {"worst_task": "tests.metrics.evaluations.worst_task"}}}  # fmt: skip
    extra = ("--overrides", f"trainer.callbacks={json.dumps([callback])}")
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0, "--metric", "worst_task", *extra) == 0
    (line,) = runs_csv(tmp_path)
    results = json.loads((tmp_path / "runs" / "tiny" / "seed_0" / "version_0" / "results.json").read_text())
    assert float(line["worst_task"]) == results["worst_task"] == min(results["accuracy_matrix"][-1])
    assert "| experiment | worst task |" in (tmp_path / "out" / "table.md").read_text()
    assert main(["tables", str(tmp_path / "out")]) == 0
    assert series(tmp_path, "--configs", tiny_config, "--seeds", 0, "--metric", "worst_task") == 2
    assert "--metric: 'worst_task' is none of all_pairs" in capsys.readouterr().err
