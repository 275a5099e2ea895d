"""The runs of a series, and which of them have a result."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mh_lightning.cli import resolved_configuration
from mh_lightning.errors import UserError
from mh_lightning.experiments.cells import Planned
from mh_lightning.metrics import CALIBRATION, continual_metrics
from mh_lightning.option_roles import Role, is_same_option, of_roles
from mh_lightning.packaged import config_file
from mh_lightning.run_folders import version_folders

METRICS = (
    *(str(name) for name in continual_metrics(1, with_top5=True) if name != "accuracy_matrix"),
    *CALIBRATION,
)
SEED, CLASS_ORDER_SEED = "seed_everything", "data.init_args.class_order_seed"
SECTIONS, WHOLE_OPTIONS, ROOT = ("model", "data", "trainer"), ("pictures", "num_threads"), "trainer.default_root_dir"
PART_OF_A_RUN = (Role.CHANGEABLE, Role.RESULT, Role.STREAM)
FIXED = ("--trainer.devices=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class Run:
    """One call of the command line.

    Args:
        experiment: its name.
        seed: of everything.
        order: seed of the class order, or None for the configuration's own.
        arguments: what `fit` is given, the run folder left out.
        folder: where its version folders and its log lie.
        configuration: what its config.yaml will hold.
    """

    experiment: str
    seed: int
    order: int | None
    arguments: tuple[str, ...]
    folder: Path
    configuration: dict[str, Any]

    @property
    def name(self) -> str:
        """Experiment, seed and class order, for the screen."""
        return f"{self.experiment}/{self.folder.name}"

    @property
    def log(self) -> Path:
        """The file that holds what the run prints."""
        return self.folder / "log.txt"

    def command(self) -> list[str]:
        """Arguments for `mh_lightning.cli.main`."""
        return ["fit", *self.arguments, "--run_dir", str(self.folder.parent), "--experiment", self.folder.name]

    def result(self) -> dict[str, Any] | None:
        """The newest complete results.json of this very configuration, or None."""
        for version in self._versions("results.json"):
            results = read_results(version / "results.json")
            if "tasks_trained" not in results:
                return results
        return None

    def checkpoint(self) -> Path | None:
        """The newest checkpoint of this very configuration, to go on from, or None."""
        versions = self._versions("checkpoints/last.ckpt")
        return next((version / "checkpoints" / "last.ckpt" for version in versions), None)

    def _versions(self, file: str) -> Iterator[Path]:
        """Version folders that hold the file, the newest first."""
        for version in version_folders(self.folder):
            saved = _saved_configuration(version)
            if (version / file).is_file() and is_same_option(essence_of(saved), essence_of(self.configuration)):
                yield version


def read_results(path: Path) -> dict[str, Any]:
    """A run's results.json.

    Raises:
        UserError: if it is damaged.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read; remove its folder, and it is run again.") from error
    return results


def _saved_configuration(version: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((version / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # of a run that was stopped too early, or not ours
        return {}
    return saved if isinstance(saved, dict) else {}


def essence_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what a run finds.

    Example:
        >>> essence_of({"run_dir": "runs", "trainer": {"max_epochs": 3, "logger": None}})
        {'trainer.max_epochs': 3}
    """
    return of_roles(configuration, *PART_OF_A_RUN)


@dataclass(frozen=True)
class Experiment:
    """Configurations with overrides, as the parser understands them.

    Args:
        name: the files', without their endings, or a table's.
        arguments: what `fit` is given, seeds left out.
        configuration: what follows from them.
    """

    name: str
    arguments: tuple[str, ...]
    configuration: dict[str, Any]

    @property
    def extra_metrics(self) -> list[str]:
        """Names of the metrics of one's own that its results will have."""
        given = self.configuration["trainer"].get("callbacks") or []
        options = [one.get("init_args") or {} for one in (given if isinstance(given, list) else [given])]
        return [name for one in options for name in one.get("extra") or {}]

    def run(self, folder: Path, seed: int, order: int | None = None) -> Run:
        """One run of it, in `folder`/seed_<seed>[_order_<order>]."""
        arguments = (*self.arguments, f"--{SEED}={seed}")
        configuration = self.configuration | {SEED: seed}
        if order is not None:
            arguments += (f"--{CLASS_ORDER_SEED}={order}",)
            data = configuration["data"]
            configuration["data"] = data | {"init_args": data["init_args"] | {"class_order_seed": order}}
        name = f"seed_{seed}" if order is None else f"seed_{seed}_order_{order}"
        return Run(self.name, seed, order, arguments, folder / name, configuration)


def read_experiment(experiment: Planned, seed: int = 0, order: int | None = None) -> Experiment:
    """Parse an experiment's configurations with its overrides, and check them with a seed and a class order.

    Args:
        experiment: its name, its files, and options of `fit` as ``key=value``, leading dashes left out or not.
        seed: any that will be run.
        order: any that will be run.

    Raises:
        UserError: if the parser refuses any of it.
    """
    files = [Path(config_file(str(file))) for file in experiment.files]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UserError(
            f"{experiment.option}: {str(missing)!r} is no file; give a YAML file such as configs/quickstart.yaml."
        )
    options = []
    for override in experiment.overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        own = key.partition(".")[0] not in SECTIONS and key not in WHOLE_OPTIONS
        if not equals or own or key.endswith(".help") or key == ROOT:
            raise UserError(
                f"--overrides: {override!r} does not fit; give an option of fit as key=value, such as "
                f"data.batch_size=8, of {', '.join(SECTIONS)} or one of {', '.join(WHOLE_OPTIONS)}; not {ROOT}."
            )
        options.append(f"--{key}={value}")
    words = [word for file in files for word in ("--config", str(file))]
    given = Experiment(experiment.name, (*words, *options), {"data": {"init_args": {}}})
    shown = " and ".join(str(file) for file in experiment.files)
    try:
        configuration = resolved_configuration(list(given.run(Path(), seed, order).arguments))
    except UserError as error:
        raise UserError(f"{shown}: {error}") from error
    devices = configuration["trainer"]["devices"]
    if devices not in ("auto", 1, "1"):
        raise UserError(f"{shown}: trainer.devices={devices!r}, but each run has one device here; give 1.")
    return Experiment(experiment.name, (*given.arguments, *FIXED), configuration)


def seeds_of(texts: Sequence[str], option: str) -> list[int]:
    """Seeds from numbers and ranges, in order and each once.

    Args:
        texts: such as ``3`` or ``0-9``, both ends included.
        option: that they come from.

    Raises:
        UserError: if one is neither.

    Example:
        >>> seeds_of(["0-2", "7", "1"], "--seeds")
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for text in texts:
        first, dash, last = text.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() for end in ends) or not int(ends[0]) <= int(ends[1]) < 2**32:
            raise UserError(f"{option}: {text!r} is no seed; give numbers from 0, or ranges such as 0-9.")
        seeds += range(int(ends[0]), int(ends[1]) + 1)
    return list(dict.fromkeys(seeds))
