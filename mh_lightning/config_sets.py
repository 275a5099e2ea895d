"""Several configurations given together, such as a stream and a method: their name, and whether they fit."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mh_lightning.config_files import load_strictly
from mh_lightning.errors import UserError, reason_of
from mh_lightning.packaged import config_files

SECTIONS = ("model", "data")
MOST_BYTES = 10**6  # of a file that an option may name


def name_of(files: Sequence[Path]) -> str:
    """The name of a run that is configured by some files.

    Example:
        >>> name_of([Path("streams/modes_cdi.yaml"), Path("methods/mir.yaml")])
        'modes_cdi_mir'
    """
    return "_".join(file.stem for file in files)


def with_classes_first(words: Sequence[str]) -> list[str]:
    """The same command line, where the class of the model or of the data comes before options of it.

    The parser gives options without a class the defaults of the base class, and a class that comes later would keep
    these in place of its own.

    Args:
        words: of a command line, configurations first.

    Example:
        >>> with_classes_first(["fit", "--model.loss=hinge", "--model", "ERACE"])
        ['fit', '--model=ERACE', '--model.loss=hinge', '--model', 'ERACE']
    """
    contents = [_content(file) for file in config_files(words) if file.is_file()]
    first: list[str] = []
    for section in SECTIONS:
        sources = [*(_class_of(content, section) for content in contents), *_classes_of_words(words, section)]
        named = [source for source in sources if source is not None]
        if named and not named[0] and any(named):
            first.append(f"--{section}={next(filter(None, named))}")
    place = 1 if words and not words[0].startswith("-") else 0  # after the command
    return [*words[:place], *first, *words[place:]]


def _class_of(content: Any, section: str) -> str | None:
    """The class that a configuration names for a section, "" if it gives options only, None if it says nothing."""
    value = content.get(section) if isinstance(content, dict) else None
    if not isinstance(value, dict):
        return None if value is None else str(value)
    return str(value.get("class_path") or "")


def _classes_of_words(words: Sequence[str], section: str) -> Iterator[str | None]:
    option = f"--{section}"
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in (option, f"{option}.class_path"):
            value = value if equals else after
            yield value if re.fullmatch(r"[\w.]+", value) else None
        elif name.startswith(f"{option}."):
            yield ""


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
