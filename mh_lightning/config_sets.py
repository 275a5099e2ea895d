"""Several configurations given together, such as a stream and a method: their name, and whether they fit."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mh_lightning.config_files import load_strictly
from mh_lightning.errors import UserError, reason_of

SECTIONS = ("model", "data")
MOST_BYTES = 10**6  # of a file that an option may name


def name_of(files: Sequence[Path]) -> str:
    """The name of a run that is configured by some files.

    Example:
        >>> name_of([Path("streams/modes_cdi.yaml"), Path("methods/mir.yaml")])
        'modes_cdi_mir'
    """
    return "_".join(file.stem for file in files)


def check_together(files: Sequence[Path]) -> None:
    """Refuse files that the parser would mix: of two that say what the head is, for instance, it would keep the options
    of the first that the second does not name; and a head after a file that changes an option of it would take the
    change back. Only a stream's backbone stays when a method comes.

    Args:
        files: configurations, in the order in which they were given.

    Raises:
        UserError: names the option and the two files, or a file that is no YAML.
    """
    classes: dict[str, Path] = {}
    options: dict[str, Path] = {}
    for file in files:
        given: dict[str, bool] = {}
        for name, is_class in _given(_content(file), file.parent):
            given[name] = given.get(name, False) or is_class or name in classes  # a class may be named by a text
        own = [name for name, is_class in given.items() if is_class]
        for name in own:
            kept = next((one for one in options if one.startswith(f"{name}.") and one not in given), None)
            if name in classes and (kept is not None or name in SECTIONS):
                stays = "" if name in SECTIONS else f", and {kept} of the first would stay"
                raise UserError(
                    f"--config: {str(classes[name])!r} and {str(file)!r} both say what {name} is{stays}; leave it out "
                    "of one, or give only options there, without a class_path."
                )
        for name in options:
            if name in given and _owner(name, [*classes, *own]) in set(own) - {*classes}:
                raise UserError(
                    f"--config: {str(file)!r} would take back {name} of {str(options[name])!r}; give it first."
                )
        classes |= dict.fromkeys(own, file)
        options |= {name: file for name, is_class in given.items() if not is_class}


def _content(file: Path) -> Any:
    try:
        return load_strictly(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config: {str(file)!r} is no text in UTF-8 ({error}); give YAML files.") from error
    except yaml.YAMLError as error:
        place = f" in line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) is not None else ""
        problem = getattr(error, "problem", None) or reason_of(error)
        raise UserError(f"--config: {str(file)!r} is no YAML{place} ({problem}); mend it.") from error


def _owner(name: str, classes: Sequence[str]) -> str:
    """The innermost class that an option belongs to."""
    return max((one for one in classes if name.startswith(f"{one}.")), key=len, default="")


def _given(value: Any, folder: Path, name: str = "") -> Iterator[tuple[str, bool]]:
    """What a configuration gives: names as in the short form of the command line, and whether each is a class."""
    piece = _piece(value, folder)
    if piece is not None:
        yield from _given(piece[1], piece[0].parent, name)
    elif isinstance(value, list) and any(isinstance(one, dict) and "class_path" in one for one in value):
        yield name, True
        for place, one in enumerate(value):  # which the parser would mix by their places
            yield from _given(one, folder, f"{name}.{place}")
    elif not isinstance(value, dict):
        yield name, False
    elif "class_path" in value or "init_args" in value:
        if "class_path" in value:
            yield name, True
        yield from _given(value.get("init_args") or {}, folder, name)
    else:
        for key, entry in value.items():
            short = re.sub(r"(^|\.)init_args(?=\.|$)", "", str(key)).strip(".")
            yield from _given(entry, folder, f"{name}.{short}" if name and short else name or short)


def _piece(value: Any, folder: Path) -> tuple[Path, Any] | None:
    """The file that an option names in place of a class, and its content."""
    if not isinstance(value, str) or "\0" in value or len(value) > MOST_BYTES:
        return None
    try:
        found = folder / Path(value).expanduser()
        if not found.is_file() or found.stat().st_size > MOST_BYTES:
            return None
        content = load_strictly(found.read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, yaml.YAMLError):
        return None
    return (found, content) if isinstance(content, dict) and {"class_path", "init_args"} & {*content} else None
