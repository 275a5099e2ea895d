"""Search for hyper-parameters with Optuna, on validation data."""

import csv
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from mh_lightning.cli import resolved_configuration
from mh_lightning.config_sets import name_of
from mh_lightning.errors import UserError, require
from mh_lightning.experiments.cells import Planned
from mh_lightning.experiments.progress import Progress
from mh_lightning.experiments.report import write_file
from mh_lightning.experiments.runs import Experiment, Run, essence_of, read_experiment, read_results
from mh_lightning.experiments.series import check_metric, make_folder
from mh_lightning.experiments.space import as_text, nested, read_space
from mh_lightning.experiments.storage import (
    counted_trials,
    dismiss_dead_trials,
    first_value,
    need_optuna,
    open_study,
    process_of,
    suggest,
)
from mh_lightning.experiments.workers import run_all

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState


@dataclass
class Candidate:
    """A trial under way.

    Args:
        trial: Optuna's.
        values: of the validation metric, by seed.
        running: how many of its seeds run now.
        error: of the first seed that failed.
    """

    trial: "Trial"
    values: dict[int, float] = field(default_factory=dict)
    running: int = 0
    error: str | None = None


class Search:
    """Trials of one experiment: asks Optuna for each, runs it with every seed, and tells the mean.

    Args:
        experiment: what is varied.
        space: a distribution for each option.
        seeds: every trial runs with each of them.
        metric: that is chosen by, on validation data.
        study: Optuna's.
        trials: how many there are to be in its storage.
    """

    def __init__(
        self,
        experiment: Experiment,
        space: Mapping[str, "BaseDistribution"],
        seeds: Sequence[int],
        metric: str,
        study: "Study",
        trials: int,
    ) -> None:
        self.experiment, self.space, self.seeds, self.metric = experiment, space, seeds, metric
        self.study, self.trials = study, trials
        self._candidates: dict[Path, Candidate] = {}

    def run(self, folder: Path, workers: int, keep: bool) -> None:
        """Run what is missing; what is stopped does not count as a trial.

        Args:
            folder: of the trials' run folders.
            workers: processes.
            keep: leave the run folders.
        """
        with Progress(self.trials, "trials") as progress:
            progress.done = self._ended()
            runs = run_all(self._runs(folder), workers, lambda run: progress.started(run.name))
            try:
                for run, error in runs:
                    candidate = self._candidates[run.folder.parent]
                    self._note(candidate, run, error)
                    told = self._tell(candidate)
                    progress.finished(run.name, told, candidate.error is not None, self._ended())
                    if told:
                        del self._candidates[run.folder.parent]
                        if not keep:
                            shutil.rmtree(run.folder.parent, ignore_errors=True)
            finally:
                runs.close()
                for candidate in self._candidates.values():
                    self.study.tell(candidate.trial, state=_failed(), skip_if_finished=True)

    def _ended(self) -> int:
        return sum(trial.state.is_finished() for trial in counted_trials(self.study))

    def _runs(self, folder: Path) -> Iterator[Run]:
        while len(counted_trials(self.study)) < self.trials:
            trial = self.study.ask()
            trial.set_user_attr("process", process_of())
            if sum(other.number <= trial.number for other in counted_trials(self.study)) > self.trials:
                self.study.tell(trial, state=_failed())  # another process was faster
                return
            values = suggest(self.study, trial, self.space)
            options = [f"--{key}={as_text(value)}" for key, value in values.items()]
            arguments = (
                *self.experiment.arguments,
                *options,
                "--trainer.enable_checkpointing=false",
                "--pictures=false",
            )
            varied = Experiment(f"trial_{trial.number}", arguments, self.experiment.configuration)
            candidate = Candidate(trial)
            place = folder / varied.name
            self._candidates[place] = candidate
            for seed in self.seeds:
                if candidate.error is not None:
                    break
                candidate.running += 1
                yield varied.run(place, seed)

    def _note(self, candidate: Candidate, run: Run, error: str | None) -> None:
        candidate.running -= 1
        if error is None:
            try:
                candidate.values[run.seed] = validation_value(run.folder, self.metric)
            except UserError as missing:
                error = str(missing)
        if candidate.error is None:
            candidate.error = error

    def _tell(self, candidate: Candidate) -> str | None:
        """Tell Optuna once all seeds have ended, or none will follow; what was told, in words."""
        if candidate.running or (candidate.error is None and len(candidate.values) < len(self.seeds)):
            return None
        trial = candidate.trial
        if candidate.error is not None:
            trial.set_user_attr("error", candidate.error)
            self.study.tell(trial, state=_failed())
            return f"trial {trial.number}, {trial.params}: {candidate.error}"
        trial.set_user_attr("values", {str(seed): candidate.values[seed] for seed in self.seeds})
        value = fmean(candidate.values.values())
        self.study.tell(trial, value)
        best = self.study.best_value
        return f"trial {trial.number}, {trial.params}: {self.metric.replace('_', ' ')} {value:.4f}, best {best:.4f}"


def _failed() -> "TrialState":
    from optuna.trial import TrialState

    return TrialState.FAIL


def validation_value(folder: Path, metric: str) -> float:
    """A metric on the validation data, of the newest run in a folder. Nothing else of its results is looked at.

    Raises:
        UserError: if there is no such number.
    """
    files = sorted(folder.glob("version_*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise UserError("it ended before its first task was evaluated, without a results.json")
    results = read_results(files[-1])
    if "tasks_trained" in results:
        raise UserError("it ended before its last task")
    value = float(results.get("validation", {}).get(metric, math.nan))
    if not math.isfinite(value):
        raise UserError(f"its results.json has no {metric} on validation data")
    return value


def run_search(
    configs: Sequence[Path],
    space: Path,
    trials: int,
    seeds: Sequence[int],
    storage: str,
    output: Path,
    metric: str = "average_accuracy",
    overrides: Sequence[str] = (),
    workers: int = 1,
    run_dir: Path | None = None,
) -> int:
    """Search until the storage holds enough trials, then write the best values and a table of all trials.

    Args:
        configs: the experiment's files, a stream before a method.
        space: YAML file of what is searched.
        trials: in all, those that the storage holds included.
        seeds: every trial runs with each of them.
        storage: a journal file, or the URL of a database.
        output: YAML file of the best values; ``<output>_trials.csv`` comes beside it.
        metric: that is chosen by, on validation data.
        overrides: options of `fit` as key=value.
        workers: processes.
        run_dir: where the trials' run folders are kept; without it they are removed.

    Returns:
        0, or 1 if no trial has a value.

    Raises:
        UserError: if an argument does not fit; nothing is run or written then.
    """
    need_optuna()
    require("--workers", workers, at_least=1)
    require("--trials", trials, at_least=1)
    distributions = read_space(space)
    firsts = [f"{key}={as_text(first_value(distribution))}" for key, distribution in distributions.items()]
    planned = Planned(name_of(configs), tuple(configs), tuple(overrides), "--config")
    # so that an option that does not exist is refused here
    read_experiment(replace(planned, overrides=(*overrides, *firsts)), seeds[0])
    experiment = read_experiment(planned, seeds[0])
    check_metric(metric, [experiment])
    if not _has_validation(experiment.configuration["data"]):
        raise UserError(
            f"{experiment.name}: the search chooses on validation data, and there is none; set it aside, "
            "for example with --overrides data.init_args.validation_fraction=0.2."
        )
    for folder, option in ((output.parent, "--output"), (run_dir, "--run_dir")):
        if folder is not None:
            make_folder(folder, option)
    from optuna.distributions import distribution_to_json

    settings = {
        "configuration": essence_of(experiment.configuration | {"seed_everything": None}),
        "space": {key: json.loads(distribution_to_json(one)) for key, one in distributions.items()},
        "seeds": list(seeds),
        "metric": metric,
    }
    kept = [] if run_dir is None else [path.name for path in run_dir.glob("trial_*")]  # before the trials are known
    study = open_study(storage, experiment.name, "minimize" if metric == "forgetting" else "maximize", settings)
    known = {f"trial_{trial.number}" for trial in study.get_trials(deepcopy=False)}
    strangers = sorted(set(kept) - known)
    if strangers:
        raise UserError(
            f"--run_dir: {str(run_dir)!r} holds {strangers[0]} of another search than {storage!r}; give another folder."
        )
    dismiss_dead_trials(study)
    search = Search(experiment, distributions, seeds, metric, study, trials)
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="mh_lightning_search_") as temporary:
            search.run(Path(temporary), workers, keep=False)
    else:
        search.run(run_dir, workers, keep=True)
    return _write(study, output, experiment, configs, metric, seeds)


def _has_validation(data: dict[str, Any]) -> bool:
    options = data["init_args"]
    if options.get("validation_fraction") or options.get("split_fractions"):
        return True
    module, _, name = data["class_path"].rpartition(".")
    return bool(getattr(import_module(module), name).brings_validation(options))


def _chosen(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial ran with, to be given beside the experiment: of a class that was searched, all options."""
    options = [f"--{key}={as_text(value)}" for key, value in values.items()]
    resolved = resolved_configuration([*experiment.arguments, *options])
    classes = [key.removesuffix(".class_path") for key in values if key.endswith(".class_path")]
    chosen = {}
    for key in values:
        value: Any = resolved
        path = []
        for part in next((one for one in classes if key.startswith(f"{one}.")), key).split("."):
            steps = [part] if part in value else ["init_args", part]  # of the short form
            path += steps
            for step in steps:
                value = value[step]
        chosen[".".join(path)] = value
    return nested(chosen)


def _write(
    study: "Study",
    output: Path,
    experiment: Experiment,
    configs: Sequence[Path],
    metric: str,
    seeds: Sequence[int],
) -> int:
    ended = [trial for trial in counted_trials(study) if trial.state.is_finished()]
    table = output.with_name(f"{output.stem}_trials.csv")
    write_file(table, _trials_csv(ended, seeds))
    failed = [trial for trial in ended if trial.value is None]
    if len(failed) == len(ended):
        print(f"None of {len(ended)} trials has a value; the first failed: {failed[0].user_attrs['error']}")
        return 1
    best = study.best_trial
    write_file(
        output,
        f"# Chosen by {metric.replace('_', ' ')} on validation data: {best.value:.4f}, the mean over "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.\n"
        f"# Trial {best.number} of {len(ended)}, of which {len(failed)} failed; all are in {table.name}.\n"
        f"# Use it with: fit {' '.join(f'--config {file.name}' for file in (*configs, output))}\n"
        + yaml.safe_dump(_chosen(experiment, best.params), sort_keys=False),
    )
    print(f"Best of {len(ended)} trials: {best.value:.4f} with {best.params}, in {output}")
    return 0


def _trials_csv(trials: "Sequence[FrozenTrial]", seeds: Sequence[int]) -> str:
    options = list(dict.fromkeys(key for trial in trials for key in trial.params))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "value", *options, *(f"value_seed_{seed}" for seed in seeds), "error"])
    for trial in trials:
        values = trial.user_attrs.get("values", {})
        writer.writerow([
            trial.number, trial.value, *(trial.params.get(key) for key in options),
            *(values.get(str(seed)) for seed in seeds), trial.user_attrs.get("error"),
        ])  # fmt: skip
    return text.getvalue()
