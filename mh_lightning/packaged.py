"""Files that come with the package: configurations, and the parts of docs/extending.md."""

from collections.abc import Sequence
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


def with_packaged(words: Sequence[str]) -> list[str]:
    """The same command line, with paths in place of the names of configurations that come with the package.

    A file that an option of a class is given, such as `--model.backbone backbones/vit_b16_mocov3.yaml`, takes the place
    of what a configuration has there; without null before it, the parser would keep the options of the one that the
    other does not name.

    Example:
        >>> with_packaged(["fit", "--config", "quickstart.yaml"])[-1] == config_file("quickstart.yaml")
        True
        >>> with_packaged(["--model.backbone=my_own.yaml"])
        ['--model.backbone=null', '--model.backbone=my_own.yaml']
    """
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if not value.endswith((".yaml", ".yml")):
            found.append(word)
            continue
        named = option or (found[-1] if found else "")
        if named.startswith("--") and "." in named and not named.endswith("+"):
            found.insert(len(found) if option else -1, f"{named}=null")
        found.append(f"{option}{equals}{config_file(value)}")
    return found
