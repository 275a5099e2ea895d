"""Which experiments there are: whole configurations, and methods on streams."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from mh_lightning.errors import UserError
from mh_lightning.packaged import CONFIGS, packaged
from mh_lightning.suggestions import closest


@dataclass(frozen=True)
class Planned:
    """An experiment to be read.

    Args:
        name: of the experiment.
        files: its configurations, a stream before a method.
        overrides: options of `fit` as key=value.
        option: that asked for it.
    """

    name: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    option: str = "--configs"


@dataclass
class Cells:
    """Every method on every stream, as `configs/tables` have them.

    Args:
        streams: names of `configs/streams`, patterns of them such as ``moons_*``, or YAML files.
        methods: the same of `configs/methods`, or what the table calls each, and its name or file.
        overrides: options of `fit` as key=value for all of them.
    """

    streams: list[str]
    methods: list[str] | dict[str, str]
    overrides: list[str] = field(default_factory=list)


def planned(cells: Cells, beside: Path | None = None) -> Iterator[Planned]:
    """The experiments of some cells, called <stream>_<method>.

    Args:
        cells: what is asked for.
        beside: a folder in which files are looked for, too: that of the table.

    Raises:
        UserError: if there is no such stream or method.

    Example:
        >>> [one.name for one in planned(Cells(["modes_c*"], {"replay": "er_reservoir"}))]
        ['modes_cdi_replay', 'modes_cdid_replay', 'modes_ci_replay']
    """
    if isinstance(cells.methods, dict):
        methods = [(name, file) for name, word in cells.methods.items() for file in _files("methods", word, beside)]
    else:
        methods = [(file.stem, file) for word in cells.methods for file in _files("methods", word, beside)]
    for word in cells.streams:
        for stream in _files("streams", word, beside):
            for name, method in methods:
                yield Planned(f"{stream.stem}_{name}", (stream, method), tuple(cells.overrides), "--streams")


def whole(pattern: str) -> list[Planned]:
    """The experiments of a file, or of a quoted pattern such as 'mine_*.yaml' in alphabetical order.

    Raises:
        UserError: if no file matches a pattern.
    """
    if not set("*?[") & set(pattern):
        return [Planned(Path(pattern).stem, (Path(pattern),))]
    found = sorted(glob(pattern))
    if not found:
        raise UserError(f"--configs: no file matches {pattern!r}.")
    return [Planned(Path(path).stem, (Path(path),)) for path in found]


def check_names(experiments: Sequence[Planned]) -> None:
    """Refuse two experiments of one name.

    Raises:
        UserError: names it.
    """
    names = [experiment.name for experiment in experiments]
    twice = next((experiment for experiment in experiments if names.count(experiment.name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice.option}: two experiments are called {twice.name!r}; rename one.")


def _files(kind: str, word: str, beside: Path | None) -> list[Path]:
    """Configurations of a kind, by a name or pattern of the package's, or by a path."""
    if word.endswith((".yaml", ".yml")):
        found_beside = beside is not None and not Path(word).is_file() and (beside / word).is_file()
        return [beside / word if beside is not None and found_beside else Path(word)]
    folder = packaged(CONFIGS) / kind
    found = sorted(folder.glob(f"{word}.yaml"))
    if not found:
        nearest = closest(word, [path.stem for path in folder.glob("*.yaml")])
        hint = f"did you mean {nearest}?" if nearest else f"`mh-lightning list {kind}` shows them, or give a YAML file."
        raise UserError(f"--{kind}: there is no {kind.removesuffix('s')} {word!r}; {hint}")
    return found
