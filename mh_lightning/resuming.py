"""What a resumed run may change of its configuration, and the rows of its table that stay."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from mh_lightning.compat import one_spelling_of_precision
from mh_lightning.errors import UserError, reason_of

# options that do not change what a run finds
FREE = r"config|run_dir|experiment|ckpt_path|verbose|pictures|trainer\.(enable_\w+|logger|default_root_dir)"
# options that may differ, which is told: of the trainer all but those that change more than the last bits of a sum
FIXED_TRAINER = (
    r"precision|plugins|callbacks|accumulate_grad_batches|gradient_clip_\w+|limit_train_batches|limit_val_batches"
    r"|overfit_batches|sync_batchnorm|use_distributed_sampler"
    r"|strategy\.init_args\.(ddp_comm_\w+|precision_plugin|model_averaging_period)"
)
CHANGEABLE = (
    rf"num_threads|trainer\.(?!({FIXED_TRAINER})(\..*)?$).*"
    r"|data\.init_args\.(root|path|num_workers|eval_batch_size|feature_cache\.init_args\.(folder|num_workers))"
    r"|data\.init_args\.feature_cache\.(folder|num_workers)"
    r"|model\.init_args\.backbone\.init_args\.(checkpoint_path|pretrained|compile)"
)
# callbacks that look on, which may come and go
ONLOOKERS = re.compile(
    r"mh_lightning\.callbacks\.[\w.]+"
    r"|lightning\.pytorch\.callbacks\.(\w+\.)*(DeviceStatsMonitor|LearningRateMonitor|ModelCheckpoint|ModelSummary"
    r"|OnExceptionCheckpoint|RichModelSummary|RichProgressBar|ThroughputMonitor|TQDMProgressBar)"
)


def is_same_option(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type, at every depth: of batches, 1 is one and 1.0 all of them.

    Example:
        >>> is_same_option(1, 1), is_same_option(1, 1.0), is_same_option({"a": [1]}, {"a": [True]})
        (True, False, False)
    """
    return pformat(one) == pformat(other)  # which sorts the keys


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
    changed = [name for name in changed if not re.fullmatch(FREE, name)]
    told = {name: f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}" for name in changed}
    fixed = [text for name, text in told.items() if not re.fullmatch(CHANGEABLE, name)]
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


def leaves(configuration: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by their dotted names."""
    for name, value in configuration.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
