"""A search space in YAML: which options are searched, and over what."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mh_lightning.errors import UserError, reason_of
from mh_lightning.experiments.runs import SECTIONS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FORMS = "{low: 0.001, high: 1.0, log: true}, {low: 1, high: 8, step: 1} or {choices: [1, 5, 25]}"
Value = str | int | float | bool | None


def read_space(path: Path) -> dict[str, "BaseDistribution"]:
    """A distribution for each option, from a YAML file whose keys are options of `fit`.

    ``{low: 1.0e-4, high: 1.0, log: true}`` is a range of numbers, of integers if both bounds are, in steps if a
    ``step`` is given; ``{choices: [1, 5, 25]}`` are single values.

    Raises:
        UserError: if the file cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--space: {str(path)!r} cannot be read; give a YAML file.") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--space: {str(path)!r} must have options of fit as its keys, each with {FORMS}.")
    for key in content:
        if str(key).partition(".")[0] not in SECTIONS:
            raise UserError(f"--space: {key} cannot be searched; give options of the model, the data or the trainer.")
    return {str(key): _distribution(str(key), form) for key, form in content.items()}


def _distribution(key: str, form: Any) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    wrong = UserError(f"--space: {key} is {form!r}; give {FORMS}.")
    if not isinstance(form, dict):
        raise wrong
    if form.keys() == {"choices"}:
        choices = form["choices"]
        if not isinstance(choices, list) or not choices or not all(isinstance(one, Value) for one in choices):
            raise wrong
        return CategoricalDistribution(choices)
    numbers = [form.get(name) for name in ("low", "high", "step") if name in form]
    if not {"low", "high"} <= form.keys() <= {"low", "high", "step", "log"} or not isinstance(
        form.get("log", False), bool
    ):
        raise wrong
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise wrong
    whole = all(isinstance(number, int) for number in numbers)
    try:
        return IntDistribution(**form) if whole else FloatDistribution(**form)
    except ValueError as error:  # such as low above high, or a logarithm of 0
        raise UserError(f"--space: {key} is {form!r}, which is no range ({reason_of(error)}).") from error


def as_text(value: Value) -> str:
    """A value as the command line takes it.

    Example:
        >>> as_text(None), as_text(True), as_text(1e-05), as_text("WTA")
        ('null', 'true', '1.0e-05', 'WTA')
    """
    return value if isinstance(value, str) else str(yaml.safe_dump(value)).removesuffix("...\n").strip()


def nested(values: Mapping[str, Value]) -> dict[str, Any]:
    """Dotted names as the sections of a configuration.

    Example:
        >>> nested({"data.init_args.increment": 2, "data.init_args.batch_size": 8})
        {'data': {'init_args': {'increment': 2, 'batch_size': 8}}}
    """
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        section = sections
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return sections
