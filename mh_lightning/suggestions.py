"""What a user may have meant: the nearest name of a class, an option or a file."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

from mh_lightning.packaged import CONFIGS, packaged

ROOMS = ("methods", "heads", "layers", "data", "backbones", "callbacks")
ELSEWHERE = ("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks")
OWN_OPTIONS = ("config", "seed_everything", "run_dir", "experiment", "pictures", "num_threads", "ckpt_path")
UNKNOWN = re.compile(
    r"'(?P<class>[\w.]+)' is no class that is known here"
    r"|module '(?P<module>[\w.]+)' has no attribute '(?P<attribute>\w+)'"
    r"|Option '(?P<option>\w+)(\.[\w.]+)?' is not accepted"
    r"|unrecognized arguments: --(?P<argument>[\w.]+)"
    r"|File does not exist: '(?P<file>[^']+)'"
)


def with_suggestion(sentence: str) -> str:
    """The same sentence, with the nearest name where it tells of one that is not known.

    Example:
        >>> with_suggestion("--model: 'FineTunning' is no class that is known here (see --help).")
        "--model: 'FineTunning' is no class that is known here; did you mean FineTuning?"
        >>> with_suggestion("--data: Option 'increments' is not accepted (see --help).")
        "--data: Option 'increments' is not accepted; did you mean increment?"
        >>> with_suggestion("--data: it is empty (see --help).")
        '--data: it is empty (see --help).'
    """
    found = UNKNOWN.search(sentence)
    if found is None:
        return sentence
    given = found.groupdict()
    module = given.pop("module")
    kind, name = next((kind, text) for kind, text in given.items() if text is not None)
    nearest = _nearest(kind, name) if module is None else closest(name, dir(sys.modules.get(module)))
    if nearest in (None, name, f"--{name}"):  # it exists, but not there
        return sentence
    return f"{sentence.removesuffix('.').removesuffix(' (see --help)')}; did you mean {nearest}?"


def _nearest(kind: str, name: str) -> str | None:
    if kind == "file":
        path = Path(name)
        own = [str(file.relative_to(packaged(CONFIGS))) for file in packaged(CONFIGS).rglob("*.yaml")]
        beside = [str(file) for file in path.parent.glob("*.yaml")]
        return closest(name, beside) or closest(f"{path.parent.name}/{path.name}", own) or closest(path.name, own)
    before, dot, last = name.rpartition(".")
    known = classes() if kind == "class" else options()
    nearest = closest(last, known)
    prefix = "--" if kind == "argument" else ""
    return nearest and f"{prefix}{before}{dot}{nearest}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The nearest of some names, if one is near."""
    return next(iter(difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.7)), None)


@cache
def classes() -> list[str]:
    """Names of the classes that configurations are made of."""
    modules = [import_module(name) for name in (*(f"mh_lightning.{room}" for room in ROOMS), *ELSEWHERE)]
    return [name for module in modules for name in vars(module) if isinstance(getattr(module, name), type)]


def options() -> list[str]:
    """Names of their options, and of the trainer's."""
    import lightning.pytorch

    rooms = [import_module(f"mh_lightning.{room}") for room in ROOMS]
    kinds = [kind for room in rooms for name in room.__all__ if isinstance(kind := getattr(room, name), type)]
    bases = {base for kind in kinds for base in kind.__mro__ if base.__module__.startswith("mh_lightning")}
    owners: list[type] = [*bases, lightning.pytorch.Trainer]
    for base in bases:
        owners += base.__subclasses__()  # in modules of the user
    return [*OWN_OPTIONS, *(name for owner in owners for name in inspect.signature(owner).parameters)]
