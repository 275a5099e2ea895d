"""Optuna's study: where it is kept, which of its trials count, and how a trial gets its values."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mh_lightning.errors import UserError, reason_of

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


def need_optuna() -> None:
    """Refuse to search without Optuna.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("search needs Optuna, which is not installed; pip install 'mh_lightning[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(
    storage: str, name: str, direction: Literal["minimize", "maximize"], settings: Mapping[str, Any]
) -> "Study":
    """The study in a storage, made if there is none.

    Args:
        storage: a journal file, which any number of processes may share, or a database's URL with ``://``. Optuna
            advises against several processes on one SQLite database.
        name: of the study.
        direction: "maximize" or "minimize".
        settings: what is searched, so that no other search goes on in this study.

    Raises:
        UserError: if the storage cannot be opened, or holds a study of that name with other settings.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        study = optuna.create_study(
            storage=_backend(storage), study_name=name, direction=direction, load_if_exists=True
        )
        known = study.user_attrs.get("settings")
        if known is None:
            study.set_user_attr("settings", dict(settings))
    except (OSError, ValueError, LookupError, ImportError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise UserError(
            f"--storage: {storage!r} cannot be opened ({reason_of(error)}); give a journal file such as "
            "runs/search.log, or a database's URL such as sqlite:///runs/search.db."
        ) from error
    changed = [key for key, value in json.loads(json.dumps(settings)).items() if known and known.get(key) != value]
    if changed:
        raise UserError(
            f"--storage: {storage!r} holds a search of {name!r} with another {changed[0]}; go on with the same, or "
            "give another storage."
        )
    return study


def _backend(storage: str) -> "BaseStorage":
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in storage:
        # a second process waits for its turn
        patience = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
        return RDBStorage(storage, engine_kwargs=patience)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def suggest(study: "Study", trial: "Trial", space: Mapping[str, "BaseDistribution"]) -> dict[str, Any]:
    """The trial's values, by the tree-structured Parzen estimator.

    Its seed is the trial's number: no two processes draw the same, nor does one that goes on repeat itself.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    study.sampler = optuna.samplers.TPESampler(seed=trial.number)
    values: dict[str, Any] = {}
    for key, one in space.items():
        if isinstance(one, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, one.choices)
        elif isinstance(one, IntDistribution):
            values[key] = trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
        elif isinstance(one, FloatDistribution):
            values[key] = trial.suggest_float(key, one.low, one.high, step=one.step, log=one.log)
    return values


def first_value(distribution: "BaseDistribution") -> Any:
    """The first choice, or the lower bound."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low


def counted_trials(study: "Study") -> "list[FrozenTrial]":
    """Trials that have ended with a value or an error, or that run; one that was stopped does not count."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.value is not None or "error" in trial.user_attrs or not trial.state.is_finished()
    ]


def process_of() -> list[str | int]:
    """Machine and number of this process, among those that share a storage."""
    return [platform.node(), os.getpid()]


def dismiss_dead_trials(study: "Study") -> None:
    """End those trials of this machine whose process is no more: journals have no heartbeat."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        machine, process = trial.user_attrs.get("process", (None, None))
        if machine == platform.node() and not _is_alive(int(process)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # a signal of 0 asks only there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
