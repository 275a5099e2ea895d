"""How configurations are read: YAML without doubt about what it says, and values that every option can take."""

import inspect
import math
import pydoc
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import register_type

from mh_lightning.errors import UserError

MODE = "strict_yaml"
MOST_NODES = 10**6  # of a file, each alias counted as what it stands for
MOST_LEVELS = 50


def load_strictly(text: str) -> Any:
    """The content of YAML; the tags of Python objects are unknown here.

    Raises:
        yaml.YAMLError: also if a mapping gives a key twice, of which YAML would silently take the last, or if what it
            stands for is too deep or too large, as where an alias holds itself.

    Example:
        >>> load_strictly("{lr: 0.1, steps: [1, 2]}")
        {'lr': 0.1, 'steps': [1, 2]}
        >>> load_strictly("{lr: 0.1, lr: 0.2}")
        Traceback (most recent call last):
        ...
        yaml.error.YAMLError: the key 'lr' is given twice, in line 1
    """
    node = _compose(text)
    if node is not None:
        _count(node, {}, 0)
    return get_loader("yaml")(text)


def _compose(text: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (RecursionError, yaml.YAMLError) as error:
        # newer versions of libyaml have a limit of their own
        if isinstance(error, yaml.YAMLError) and "maximum nesting depth" not in str(error):
            raise
        raise yaml.YAMLError("it is nested too deeply") from error
    return node


def _count(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """How many nodes there are in one, itself included."""
    if level > MOST_LEVELS:
        raise yaml.YAMLError("it is nested too deeply")
    if id(node) in known:
        return known[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(keys) > len(set(keys)):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"the key {twice!r} is given twice, in line {node.start_mark.line + 1}")
        children = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_count(child, known, level + 1) for child in children)
    if known[id(node)] > MOST_NODES:
        raise yaml.YAMLError(f"it stands for more than {MOST_NODES} values")
    return known[id(node)]


set_loader(MODE, load_strictly, (yaml.YAMLError,))
# as a default of Lightning's, else written into config.yaml as a sentence that it cannot be written
register_type(torch.device, fail_already_registered=False, deserializer_exceptions=RuntimeError)
# none of the modules that run commands is looked into, which is only a warning by default
set_parsing_settings(import_path_denylist=["os"])


def check_values(value: Any, name: str = "") -> None:
    """Refuse what no option can take, whatever its type: NaN, integers of more than 64 bits, null characters, and no
    options where the trainer's belong.

    Raises:
        UserError: names the option.

    Example:
        >>> check_values({"data": {"batch_size": 10**20}})
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: data.batch_size must lie in [-2**63, 2**63), got 100000000000000000000.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            check_values(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            check_values(entry, f"{name}[{place}]")
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(f"{name} must be a number, got NaN.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name} must lie in [-2**63, 2**63), got {value}.")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} must not hold a null character, got {value!r}.")
    if name == "trainer" and not isinstance(value, dict):
        raise UserError(f"trainer must hold options by name, got {value!r}.")


def check_nulls(value: Any, name: str, owner: type | None = None) -> None:
    """Refuse null where an option's type does not have it, which jsonargparse takes for any option.

    Args:
        value: options by name, or a class_path with its init_args.
        name: of what the options belong to.
        owner: the class that they are options of.

    Raises:
        UserError: names the option.

    Example:
        >>> check_nulls({"class_path": "mh_lightning.data.Digits", "init_args": {"batch_size": None}}, "data")
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: data.init_args.batch_size must not be null.
    """
    if isinstance(value, list):
        for place, entry in enumerate(value):
            check_nulls(entry, f"{name}[{place}]")
    elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
        made = pydoc.locate(value["class_path"])
        check_nulls(value.get("init_args"), f"{name}.init_args", made if isinstance(made, type) else None)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if entry is None and owner is not None and not _takes_null(owner, key):
                raise UserError(f"{name}.{key} must not be null.")
            check_nulls(entry, f"{name}.{key}")


def _takes_null(owner: type, name: str) -> bool:
    """Whether the type of a class's option has None; unknown types do."""
    for base in owner.__mro__:
        made = base.__dict__.get("__init__")
        if made is not None and name in inspect.signature(made).parameters:
            try:
                hint = get_type_hints(made).get(name, Any)
            except (NameError, TypeError):  # names that are imported for type checkers only
                return True
            return hint is Any or NoneType in get_args(hint) or not (get_args(hint) or isinstance(hint, type))
    return True
