"""Files that come with the package: configurations, and the parts of docs/extending.md."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS, EXAMPLES = "configs", "examples/extending"
CONFIG_OPTIONS = ("--config", "-c")


def packaged(folder: str) -> Path:
    """A folder of the package: inside an installed one, beside it in a clone."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def config_file(name: str) -> str:
    """A configuration by its path, or by the name of one that comes with the package.

    Example:
        >>> config_file("quickstart.yaml") == str(packaged(CONFIGS) / "quickstart.yaml")
        True
        >>> config_file("no_such.yaml")
        'no_such.yaml'
    """
    own = packaged(CONFIGS) / name
    return str(own) if not Path(name).exists() and not Path(name).is_absolute() and own.is_file() else name


def config_files(words: Sequence[str]) -> list[Path]:
    """The configurations that a command line names.

    Example:
        >>> [path.name for path in config_files(["fit", "--config", "a.yaml", "--config=b.yaml"])]
        ['a.yaml', 'b.yaml']
    """
    given = ((word, before in CONFIG_OPTIONS) for before, word in pairwise(["", *words]))
    found = [word.removeprefix("--config=") for word, named in given if named or word.startswith("--config=")]
    return [Path(word).expanduser() for word in found]


def with_packaged(words: Sequence[str]) -> list[str]:
    """The same command line, with paths in place of the names of configurations that come with the package.

    Configurations come first, so that options override them wherever they stand. A file that an option of a class is
    given, such as `--model.backbone backbones/vit_b16_mocov3.yaml`, takes the place of what a configuration has there;
    without null before it, the parser would keep the options of the one that the other does not name.

    Raises:
        UserError: if a file is given for the whole model or data, whose options would mix with a configuration's.

    Example:
        >>> with_packaged(["fit", "--seed_everything", "1", "--config", "mine.yaml"])
        ['fit', '--config', 'mine.yaml', '--seed_everything', '1']
        >>> with_packaged(["--model.backbone=my_own.yaml"])
        ['--model.backbone=null', '--model.backbone=my_own.yaml']
    """
    from mh_lightning.errors import UserError  # which imports torch, and lists need no torch

    configs: list[str] = []
    others: list[str] = []
    for (before, word), after in zip(pairwise(["", *words]), [*words[1:], "-"], strict=True):
        option, equals, value = word.partition("=") if word.startswith("-") else (before, "", word)
        if option in CONFIG_OPTIONS and (equals or word != option):
            configs += ["--config", config_file(value)]
        elif word in CONFIG_OPTIONS and not after.startswith("-"):
            continue  # it comes with its file; without one, the parser refuses it
        elif value.endswith((".yaml", ".yml")) and option in ("--model", "--data"):
            raise UserError(
                f"{option}: the options of {value!r} would mix with others; name it in a file for --config."
            )
        elif value.endswith((".yaml", ".yml")) and option.startswith(("--model.", "--data.")) and option[-1] != "+":
            others.insert(len(others) if equals else -1, f"{option}=null")
            others.append(f"{option}=" * bool(equals) + config_file(value))
        else:
            others.append(word)
    place = 1 if others and not others[0].startswith("-") else 0  # after the command
    return [*others[:place], *configs, *others[place:]]
