"""What Python code does, in values that JSON takes: of installed packages the version, any other the code itself."""

import dis
import importlib
import importlib.metadata
import importlib.util
import json
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mh_lightning.data.features.digest import digest

GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
WHOLE_SCOPE = ("globals", "eval", "exec")  # which find globals by texts


@cache
def installed_version(module: str | None) -> str | None:
    """The version of the installed package that a module is part of, or None if it is of somebody's own making: not
    installed, or from a folder, whose content may change under one version.

    Example:
        >>> installed_version("torch.nn") == importlib.metadata.version("torch"), installed_version("__main__")
        (True, None)
    """
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return sysconfig.get_python_version() if top != "__main__" else None
    if top in sys.modules:
        file = getattr(sys.modules[top], "__file__", None)
    else:
        file = getattr(importlib.util.find_spec(top) if top else None, "origin", None)
    if file is None or not _is_place_of_packages(Path(file).resolve().parents[Path(file).stem == "__init__"]):
        return None
    try:
        installed = importlib.metadata.distribution(top)
    except importlib.metadata.PackageNotFoundError:  # the package has another name than its module
        version = getattr(sys.modules[top], "__version__", None)
        return None if version is None else str(version)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return None if "dir_info" in origin else installed.version


@cache
def _is_place_of_packages(folder: Path) -> bool:
    places = {*site.getsitepackages(), site.getusersitepackages(), *map(sysconfig.get_path, ("purelib", "platlib"))}
    return folder in {Path(place).resolve() for place in places} or any(folder.glob("*.dist-info"))


def is_found(value: Any) -> bool:
    """Whether a class or function is what its module has under its name."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def described_code(code: CodeType, refer: Callable[[Any], Any]) -> list[Any]:
    """What compiled code does, whatever file and line it stands in.

    Args:
        code: of a function, a class or a module.
        refer: tells what its constants are.
    """
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    return ["code", digest(code.co_code, code.co_exceptiontable), counts, names, [refer(one) for one in code.co_consts]]


def names_in(code: CodeType) -> Iterator[str]:
    """Names that code and the functions in it have of globals and attributes, and their texts, which may be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
        for text in constant if isinstance(constant, tuple | frozenset) else (constant,):
            if isinstance(text, str):
                yield text


def globals_of(code: CodeType, scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The global objects that code and the functions in it use, and the modules that they import, by name: all there
    are, if it may find them by texts.

    Args:
        code: of a function.
        scope: its globals.
    """
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in GLOBAL and instruction.argval in scope:
            yield instruction.argval, scope[instruction.argval]
        elif instruction.opname in GLOBAL and instruction.argval in WHOLE_SCOPE:
            yield from ((name, one) for name, one in scope.items() if not is_special(name))
        if instruction.opname == "IMPORT_NAME":
            yield from _imported("." * before[-2].argval + instruction.argval, scope)
        if instruction.opname != "EXTENDED_ARG":
            before.append(instruction)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from globals_of(constant, scope)


def modules_as_values(code: CodeType, scope: dict[str, Any]) -> Iterator[ModuleType]:
    """Somebody's own modules that code and the functions in it use otherwise than by the names of what is in them."""
    instructions = [one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"]
    for place, instruction in enumerate(instructions):
        value = scope.get(instruction.argval) if instruction.opname in GLOBAL else None
        for later in instructions[place + 1 :]:
            if not isinstance(value, ModuleType) or installed_version(value.__name__) is not None:
                break
            if later.opname not in ATTRIBUTE or later.argval == "__dict__":
                yield value
                break
            value = vars(value).get(later.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from modules_as_values(constant, scope)


def is_special(name: str) -> bool:
    """Whether Python itself gives a name its meaning."""
    return name.startswith("__") and name.endswith("__")


def _imported(name: str, scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The version of an installed package that code imports; of others the module, and those that it lies in."""
    whole = importlib.util.resolve_name(name, scope.get("__package__") or "")
    version = installed_version(whole)
    if version is not None:
        yield whole, version
        return
    parts = whole.split(".")
    for stop in range(1, len(parts) + 1):
        with suppress(ImportError):  # what is not there does nothing
            yield ".".join(parts[:stop]), importlib.import_module(".".join(parts[:stop]))
