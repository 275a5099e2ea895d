"""Several configurations given together, such as a stream and a method: their name, and whether they fit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mh_lightning.config_files import load_strictly
from mh_lightning.errors import UserError

PARTS = ("model.head", "model.backbone", "model", "data")  # which are replaced as a whole, not changed class by class


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
    change back.

    Args:
        files: configurations that can be read, in the order in which they were given.

    Raises:
        UserError: names the option and the two files.
    """
    classes: dict[str, Path] = {}
    options: dict[str, Path] = {}
    for file in files:
        given = dict(_given(load_strictly(file.read_text(encoding="utf-8")), file.parent))
        own = [name for name, is_class in given.items() if is_class]
        first_here = [name for name in own if name not in classes]
        for name in options:
            part = next((part for part in PARTS if part in own and part in classes and name.startswith(f"{part}.")), "")
            if part and name not in given:
                raise UserError(
                    f"--config: {str(classes[part])!r} and {str(file)!r} both say what {part} is, and {name} of the "
                    "first would stay; leave it out of one, or give only options there, without a class_path."
                )
            if name in given and _owner(name, [*classes, *own]) in first_here:
                raise UserError(
                    f"--config: {str(file)!r} would take back {name} of {str(options[name])!r}; give it first."
                )
        classes |= dict.fromkeys(own, file)
        options |= {name: file for name, is_class in given.items() if not is_class}


def _owner(name: str, classes: Sequence[str]) -> str:
    """The innermost class that an option belongs to."""
    return max((one for one in classes if name.startswith(f"{one}.")), key=len, default="")


def _given(value: Any, folder: Path, name: str = "") -> Iterator[tuple[str, bool]]:
    """What a configuration gives: names as in the short form of the command line, and whether each is a class."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and (folder / value).is_file():
        piece = folder / value
        yield from _given(load_strictly(piece.read_text(encoding="utf-8")), piece.parent, name)
    elif not isinstance(value, dict):
        yield name, False
    elif "class_path" in value or "init_args" in value:
        if "class_path" in value:
            yield name, True
        yield from _given(value.get("init_args") or {}, folder, name)
    else:
        for key, entry in value.items():
            yield from _given(entry, folder, f"{name}.{key}" if name else str(key))
