"""What a checkpoint says of its model in plain values, and the model that is made again from them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mh_lightning.backbones import Peft
from mh_lightning.errors import UserError

TRUSTED = ("mh_lightning", "torch.nn", "torch.optim")  # whose classes a checkpoint may name
KINDS = (nn.Module, Optimizer, LRScheduler, Peft)
OPTIMIZATION = ("optimizer", "lr_scheduler")  # which a model that only answers does not need
PLAIN = (bool, int, float, str, type(None))


def described(method: nn.Module, make_head: Callable[..., nn.Module]) -> dict[str, Any]:
    """A method as class and plain arguments, like a configuration's `model`; None stands for what has no such form.

    Args:
        method: with a `mh_lightning.backbones.Backbone` as `backbone`.
        make_head: a class, or a `functools.partial` of one with plain arguments by name.
    """
    backbone: Any = method.backbone
    arguments = backbone.arguments()
    taken = arguments_of(type(method))
    options = {name: value for name, value in vars(method).items() if name in taken}
    lost = sorted(taken - options.keys() - {"backbone", "head", *OPTIMIZATION})
    if lost:
        name = f"{type(method).__name__}.{lost[0]}"
        rank_zero_warn(
            f"{name}: a checkpoint tells the arguments of a method that are attributes of the same names, and this one "
            f"is none, so a loaded model would take its default; set self.{lost[0]} in __init__."
        )
    options = {name: asdict(value) if is_dataclass(value) else value for name, value in options.items()}  # type: ignore[arg-type]
    makers = {name: getattr(method, f"_make_{name}", None) for name in OPTIMIZATION if name in taken}
    optimization = {name: _factory(make) for name, make in makers.items() if make is not None}
    return {
        "class_path": path_of(type(method)),
        "init_args": {
            **{
                name: value
                for name, value in options.items()
                if isinstance(value, (*PLAIN, dict)) or _is_plain_list(value)
            },
            "backbone": None if arguments is None else {"class_path": path_of(type(backbone)), "init_args": arguments},
            "head": _factory(make_head),
            **optimization,
        },
    }


def arguments_of(kind: type) -> set[str]:
    """The arguments of a class by name, those included that it hands on to its bases.

    Example:
        >>> sorted(arguments_of(nn.ReLU))
        ['inplace']
    """
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = signature(vars(base)["__init__"]).parameters.values() if "__init__" in vars(base) else ()
        names |= {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        if parameters and not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return names - {"self"}


def _factory(make: Any) -> dict[str, Any] | None:
    arguments: Mapping[str, Any] = {}
    if isinstance(make, partial) and not make.args:
        make, arguments = make.func, make.keywords
    plain = all(isinstance(value, PLAIN) or _is_plain_list(value) for value in arguments.values())
    if not isinstance(make, type) or not plain:
        return None
    return {"class_path": path_of(make), "init_args": dict(arguments)}


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, PLAIN) for one in value)


def path_of(kind: type) -> str:
    """The name by which a class is imported.

    Example:
        >>> path_of(nn.Linear)
        'torch.nn.modules.linear.Linear'
    """
    return f"{kind.__module__}.{kind.__qualname__}"


def built(
    tree: Any,
    given: Mapping[str, Any],
    trust: Collection[str] = (),
    option: str = "from",
    missing: list[str] | None = None,
) -> Any:
    """An instance of a described class.

    Args:
        tree: its class_path and init_args, at every depth.
        given: objects in place of arguments of the same names.
        trust: packages, beside this one and torch.nn, whose classes may be named.
        option: that is named in errors.
        missing: gets the names of optimizer and scheduler if they cannot be made, since only to learn they are needed.

    Raises:
        UserError: if something is named that is no class of these, or is not described and not given.

    Example:
        >>> built({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}, {})
        Linear(in_features=2, out_features=3, bias=True)
        >>> built({"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, {})
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: from: the checkpoint names the class 'subprocess.Popen', and only those of \
mh_lightning and torch.nn are made unasked; if you know it, trust='subprocess' allows it.
    """
    kind, arguments = _kind_and_arguments(tree, given, trust, option, [] if missing is None else missing)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"{option}: {path_of(kind)} cannot be made again ({error}).") from error


def _kind_and_arguments(
    tree: Any, given: Mapping[str, Any], trust: Collection[str], option: str, missing: list[str]
) -> tuple[type, dict[str, Any]]:
    if not isinstance(tree, dict) or not isinstance(tree.get("init_args", {}), dict):
        raise UserError(f"{option}: the checkpoint's description of its model is damaged.")
    kind = trusted_class(tree.get("class_path"), trust, option)
    hints = hints_of(kind)
    arguments: dict[str, Any] = {}
    for name, value in tree.get("init_args", {}).items():
        makes = _makes(hints.get(name))
        if name in given:
            continue
        if name in OPTIMIZATION:
            maker = _maker(value, trust, option)
            if maker is not None:
                arguments[name] = maker
            elif name == "optimizer" or value is not None:
                missing.append(name)
            continue
        if isinstance(value, dict) and "class_path" in value:
            inner, inner_arguments = _kind_and_arguments(value, {}, trust, option, missing)
            arguments[name] = partial(inner, **inner_arguments) if makes else inner(**inner_arguments)
        elif makes and value is not None:
            raise UserError(f"{option}: the checkpoint describes {name} by {value!r}, which is no class.")
        elif isinstance(value, dict) and is_dataclass(found := _without_none(hints.get(name))):
            arguments[name] = found(**value)  # type: ignore[operator]
        elif value is None and name in ("backbone", "head"):
            raise UserError(f"{option}: the checkpoint does not describe its {name}, which was made in Python; give "
                            f"{name}=… .")  # fmt: skip
        else:
            arguments[name] = value
    arguments.update({name: value for name, value in given.items() if name in arguments_of(kind)})
    return kind, arguments


def check_described(tree: Any, trust: Collection[str], option: str) -> None:
    """See that a description names, at every depth, only classes that may be made, before anybody else reads it.

    Raises:
        UserError: otherwise.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("init_args", {}), dict):
        raise UserError(f"{option}: the checkpoint's description of its model is damaged.")
    hints = hints_of(trusted_class(tree.get("class_path"), trust, option))
    for name, value in tree.get("init_args", {}).items():
        hint = _without_none(hints.get(name))
        if isinstance(value, dict) and "class_path" in value:
            check_described(value, trust, option)
        elif value is not None and (_makes(hint) or (isinstance(hint, type) and issubclass(hint, KINDS))):
            raise UserError(f"{option}: the checkpoint describes {name} by {value!r}, which is no class.")


def hints_of(kind: type) -> dict[str, Any]:
    """The types of a class's arguments, of those included that it hands on to its bases."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and base is not object:
            found |= get_type_hints(vars(base)["__init__"])
    return found


def _maker(value: Any, trust: Collection[str], option: str) -> Any:
    """What makes a described optimizer or scheduler; None if that is not described, or not trusted."""
    try:
        kind, arguments = _kind_and_arguments(value, {}, trust, option, [])
    except UserError:
        return None
    return partial(kind, **arguments)


def _makes(hint: Any) -> bool:
    """Whether an argument is something that makes objects."""
    return get_origin(_without_none(hint)) is Callable or get_origin(_without_none(hint)) is type


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next((one for one in get_args(hint) if one is not type(None)), None)
    return hint


def trusted_class(path: Any, trust: Collection[str], option: str) -> type:
    """A class by its name, of a package that may be named.

    Raises:
        UserError: otherwise.
    """
    allowed = (*TRUSTED, *([trust] if isinstance(trust, str) else trust))
    package = str(path).partition(".")[0]
    if not isinstance(path, str) or not any(path.startswith(f"{name}.") for name in allowed):
        raise UserError(
            f"{option}: the checkpoint names the class {path!r}, and only those of mh_lightning and torch.nn are made "
            f"unasked; if you know it, trust={package!r} allows it."
        )
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{option}: there is no class {path!r} here ({error}).") from error
    if not isinstance(found, type) or not issubclass(found, KINDS):
        raise UserError(f"{option}: {path!r} is no torch.nn.Module, optimizer or scheduler.")
    return found
