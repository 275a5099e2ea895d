"""Searches: some on the tiny stream, the others with runs whose results are made up."""

import csv
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from mh_lightning.cli import resolved_configuration
from mh_lightning.experiments import workers
from mh_lightning.experiments.__main__ import main
from mh_lightning.experiments.storage import process_of
from tests.experiments.conftest import InProcess

optuna = pytest.importorskip("optuna")
RATE = "model.init_args.optimizer.init_args.lr"


@pytest.fixture
def search(tmp_path: Path, tiny_config: Path) -> Callable[..., int]:
    def call(space: str, trials: int, *words: str) -> int:
        (tmp_path / "space.yaml").write_text(space)
        return main(["search", *arguments(tmp_path, tiny_config, trials), *words])

    return call


def arguments(folder: Path, config: Path, trials: int) -> list[str]:
    return [
        "--config", str(config), "--space", str(folder / "space.yaml"), "--trials", str(trials), "--seeds", "0", "1",
        "--storage", str(folder / "search.log"), "--output", str(folder / "best.yaml"),
    ]  # fmt: skip


def trials_csv(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "best_trials.csv").open() as file:
        return list(csv.DictReader(file))


def made_up(
    command: list[str], log: Path, checkpoint: Path | None = None, test: float = 0.5, seconds: float = 0
) -> str | None:
    """A run that is the better on validation data, the nearer its learning rate is to 0.1; above 0.5 it fails."""
    time.sleep(seconds)
    rate = float(next(word for word in command if RATE in word).partition("=")[2])
    if rate > 0.5:
        return "the loss became NaN"
    version = log.parent / "version_0"
    version.mkdir(parents=True)
    results = {"average_accuracy": test * rate, "validation": {"average_accuracy": 1 - abs(rate - 0.1)}}
    (version / "results.json").write_text(json.dumps(results))
    return None


@pytest.mark.usefixtures("in_process")
def test_the_better_learning_rate_is_chosen(tmp_path: Path, tiny_config: Path, search: Callable[..., int]) -> None:
    assert search(f"{RATE}: {{choices: [1.0e-06, 0.01]}}", 3, "--seeds", "0", "--run_dir", str(tmp_path / "kept")) == 0
    rates = {line[RATE] for line in trials_csv(tmp_path)}
    assert rates == {"1e-06", "0.01"}
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == {
        "model": {"init_args": {"optimizer": {"init_args": {"lr": 0.01}}}}
    }
    both = ["--config", str(tiny_config), "--config", str(tmp_path / "best.yaml")]
    assert resolved_configuration(both)["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    results = json.loads(next((tmp_path / "kept" / "trial_0").rglob("results.json")).read_text())
    assert float(trials_csv(tmp_path)[0]["value"]) == results["validation"]["average_accuracy"]
    assert not list((tmp_path / "kept").rglob("*.ckpt"))


@pytest.mark.usefixtures("in_process")
def test_test_data_has_no_part_in_the_choice(
    tmp_path: Path, search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for test in (1.0, -1.0):  # what is best on one's test data is worst on the other's
        monkeypatch.setattr(workers, "execute", partial(made_up, test=test))
        assert search(f"{RATE}: {{low: 0.001, high: 0.4}}", 12, "--storage", str(tmp_path / f"{test}.log")) == 0
        found.append((tmp_path / "best.yaml").read_text() + (tmp_path / "best_trials.csv").read_text())
    assert found[0] == found[1]
    chosen = yaml.safe_load((tmp_path / "best.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    nearest = min(abs(float(line[RATE]) - 0.1) for line in trials_csv(tmp_path))
    assert abs(chosen - 0.1) == nearest


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("storage", ["search.log", "sqlite:///{}/search.db"])
def test_a_search_goes_on_and_counts_failures(
    tmp_path: Path, search: Callable[..., int], monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    monkeypatch.setattr(workers, "execute", made_up)
    where = storage.format(tmp_path) if "://" in storage else str(tmp_path / storage)
    space = f"{RATE}: {{low: 0.001, high: 1.0}}"
    assert search(space, 3, "--storage", where) == 0
    first = trials_csv(tmp_path)
    assert search(space, 8, "--storage", where) == 0
    both = trials_csv(tmp_path)
    assert both[:3] == first
    assert [line["trial"] for line in both] == [str(number) for number in range(8)]
    assert len({line[RATE] for line in both}) == 8  # going on does not draw the first ones again
    assert {line["error"] for line in both if float(line[RATE]) > 0.5} == {"the loss became NaN"}
    assert all((line["value"] == "") == (float(line[RATE]) > 0.5) for line in both)
    assert search(space, 8, "--storage", where) == 0
    assert trials_csv(tmp_path) == both


@pytest.mark.usefixtures("in_process")
def test_a_stopped_trial_does_not_count(
    tmp_path: Path, search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(command: list[str], log: Path, checkpoint: Path | None = None) -> str | None:
        if "trial_2" in str(log):
            raise KeyboardInterrupt
        return made_up(command, log)

    space = f"{RATE}: {{low: 0.001, high: 0.4}}"
    monkeypatch.setattr(workers, "execute", stopped)
    assert search(space, 4) == 130
    assert not (tmp_path / "best.yaml").exists()
    monkeypatch.setattr(workers, "execute", made_up)
    assert search(space, 4) == 0
    assert [line["trial"] for line in trials_csv(tmp_path)] == ["0", "1", "3", "4"]


def search_with_made_up_runs(words: list[str]) -> None:
    """A process of its own that searches."""
    sys.argv = ["search"]
    workers.ProcessPoolExecutor = InProcess  # type: ignore[assignment,misc]
    workers.execute = partial(made_up, seconds=0.05)  # type: ignore[assignment]
    raise SystemExit(main(words))


def test_two_processes_on_one_storage(tmp_path: Path, tiny_config: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"{RATE}: {{low: 0.001, high: 0.4}}")
    words = ["search", *arguments(tmp_path, tiny_config, 30)]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=search_with_made_up_runs, args=(words,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = trials_csv(tmp_path)
    assert len(lines) == 30  # neither more nor less than asked for
    assert len({line[RATE] for line in lines}) == 30
    journal = [json.loads(line) for line in (tmp_path / "search.log").read_text().splitlines()]
    owners = {str(entry["user_attr"]["process"]) for entry in journal if "process" in entry.get("user_attr", {})}
    assert len(owners) == 2


@pytest.mark.usefixtures("in_process")
def test_a_dead_process_leaves_no_trial_that_counts(
    tmp_path: Path, search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = f"{RATE}: {{low: 0.001, high: 0.4}}"
    monkeypatch.setattr(workers, "execute", made_up)
    assert search(space, 1) == 0
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "search.log")))
    (name,) = optuna.get_all_study_names(storage)
    trial = optuna.load_study(study_name=name, storage=storage).ask()
    finished = multiprocessing.get_context("fork").Process(target=int)
    finished.start()
    finished.join()
    trial.set_user_attr("process", [process_of()[0], finished.pid])
    assert search(space, 2) == 0
    assert [line["trial"] for line in trials_csv(tmp_path)] == ["0", "2"]


@pytest.mark.parametrize(
    ("space", "words", "told"),
    [
        ("[1, 2]", [], ["--space", "choices"]),
        (f"{RATE}: 3", [], ["--space", RATE, "choices"]),
        (f"{RATE}: {{low: 2.0, high: 1.0}}", [], ["--space", RATE]),
        (f"{RATE}: {{low: 0, high: 1, log: true}}", [], ["--space", RATE]),
        (f"{RATE}: {{choices: [[1]]}}", [], ["--space", RATE]),
        ("seed_everything: {low: 0, high: 9}", [], ["--space", "seed_everything"]),
        ("model.init_args.speed: {low: 0, high: 9}", [], ["speed"]),
        (f"{RATE}: {{low: 0.1, high: 1.0}}", ["--trials", "0"], ["--trials", "0"]),
        (f"{RATE}: {{low: 0.1, high: 1.0}}", ["--storage", "unknown://a"], ["--storage", "unknown://a", "journal"]),
        (
            f"{RATE}: {{low: 0.1, high: 1.0}}",
            ["--overrides", "data.init_args.validation_fraction=0.0"],
            ["validation data", "validation_fraction"],
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str],
    space: str, words: list[str], told: list[str],
) -> None:  # fmt: skip
    assert search(space, 2, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in told), errors[0]
    assert not re.search(r"Traceback|\n", errors[0])
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.usefixtures("in_process")
def test_another_search_is_not_mixed_in(
    tmp_path: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "execute", made_up)
    space = f"{RATE}: {{low: 0.001, high: 0.4}}"
    assert search(space, 1) == 0
    assert search(space, 2, "--seeds", "5") == 2
    assert "another seeds" in capsys.readouterr().err
    assert search(f"{RATE}: {{low: 0.001, high: 0.3}}", 2) == 2
    assert "another space" in capsys.readouterr().err
    assert search(space, 2, "--overrides", "data.init_args.batch_size=8") == 2
    assert "another configuration" in capsys.readouterr().err
    assert len(trials_csv(tmp_path)) == 1


@pytest.mark.usefixtures("in_process")
def test_run_folders_of_another_search_are_not_mixed_in(
    tmp_path: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "execute", made_up)
    space, kept = f"{RATE}: {{low: 0.001, high: 0.4}}", ["--run_dir", str(tmp_path / "kept")]
    assert search(space, 1, *kept) == 0
    assert search(space, 2, *kept) == 0  # goes on in its own
    assert search(space, 2, *kept, "--storage", str(tmp_path / "other.log")) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in told for word in ("--run_dir", "kept", "trial_0", "another search"))


def test_optuna_that_is_missing_is_told(
    search: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(f"{RATE}: {{low: 0.001, high: 0.4}}", 1) == 2
    assert "pip install 'mh_lightning[search]'" in capsys.readouterr().err
