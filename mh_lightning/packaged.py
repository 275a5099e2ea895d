"""Files that come with the package: configurations, and the parts of docs/extending.md."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS, EXAMPLES = "configs", "examples/extending"


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
