"""What a resumed run may change of its configuration, and the rows of its table that stay."""

import csv
import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from mh_lightning.compat.lightning_names import one_spelling_of_precision
from mh_lightning.errors import UserError, reason_of
from mh_lightning.option_roles import Role, is_same_option, leaves, role_of

# callbacks that look on, which may come and go
ONLOOKERS = re.compile(
    r"mh_lightning\.callbacks\.[\w.]+"
    r"|lightning\.pytorch\.callbacks\.(\w+\.)*(DeviceStatsMonitor|LearningRateMonitor|ModelCheckpoint|ModelSummary"
    r"|OnExceptionCheckpoint|RichModelSummary|RichProgressBar|ThroughputMonitor|TQDMProgressBar)"
)


def check_configuration(text: Any, own: dict[str, Any]) -> None:
    """Compare the configuration that a run began with and the one that it is to go on with; what may differ is told.

    Args:
        text: of the YAML in the checkpoint.
        own: of this run.

    Raises:
        UserError: names all options that differ and cannot change in a run.
    """
    try:
        saved = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError("ckpt_path: the checkpoint's configuration is damaged; give another checkpoint.")
    before, now = dict(leaves(_essence(saved))), dict(leaves(_essence(own)))
    changed = [name for name in sorted(before | now) if not is_same_option(before.get(name), now.get(name))]
    changed = [name for name in changed if role_of(name) is not Role.FREE]
    told = {name: f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}" for name in changed}
    fixed = [text for name, text in told.items() if role_of(name) in (Role.RESULT, Role.STREAM)]
    if fixed:
        raise UserError(
            f"ckpt_path: the run began with other options than it is to go on with ({', '.join(fixed)}), and these "
            "cannot change in a run; use those it began with, or begin anew without --ckpt_path."
        )
    if told:
        rank_zero_warn(f"ckpt_path: the run goes on with other options than it began with: {', '.join(told.values())}.")


def _essence(configuration: dict[str, Any]) -> dict[str, Any]:
    """The same with one spelling of the precision, and without callbacks that look on."""
    trainer = configuration.get("trainer")
    if not isinstance(trainer, dict):
        return configuration
    given = trainer.get("callbacks") or []
    acting = [one for one in (given if isinstance(given, list) else [given]) if not _looks_on(one)]
    return configuration | {"trainer": trainer | {"callbacks": acting, "precision": _spelled(trainer.get("precision"))}}


def _spelled(precision: Any) -> Any:
    try:
        return one_spelling_of_precision(precision) or "32-true"
    except (TypeError, ValueError):  # of a damaged checkpoint; it differs from any other
        return precision


def _looks_on(callback: Any) -> bool:
    return isinstance(callback, dict) and ONLOOKERS.fullmatch(str(callback.get("class_path"))) is not None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def logged_rows(metrics: Path, checkpoint: dict[str, Any], chunks: bool) -> list[dict[str, Any]]:
    """The rows of a metrics.csv that were there when a checkpoint was saved; a resumed run logs the others again.

    Args:
        metrics: the file, which need not exist.
        checkpoint: what the run goes on from.
        chunks: whether a row is a chunk, whose step is that after it, or a batch, whose step is that before it.
    """
    if not metrics.is_file():
        return []
    tasks, steps = checkpoint.get("tasks_trained", 0), checkpoint.get("global_step", 0) + chunks
    try:
        with metrics.open(newline="") as file:
            rows = [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(file)]
        return [
            row | {"step": int(row["step"])}
            for row in rows
            if "step" in row and (float(row["task"]) <= tasks if "task" in row else int(row["step"]) < steps)
        ]
    except (OSError, ValueError, csv.Error) as error:
        rank_zero_warn(
            f"{str(metrics)!r} is damaged ({reason_of(error)}) and begins anew; results.json is not made of it."
        )
        return []
