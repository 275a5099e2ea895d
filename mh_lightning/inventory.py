"""``mh-lightning list`` and ``mh-lightning init``: what there is, and a copy to begin with."""

import argparse
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mh_lightning.packaged import CONFIGS, EXAMPLES, packaged

START = (
    "quickstart.yaml",
    "streams/digits_normalized.yaml",
    "methods/linear.yaml",
    "methods/kernel_memory_head.yaml",
    "backbones/efficientnet_lite0_normalized.yaml",
)


def main(words: Sequence[str]) -> None:
    """Run ``list KIND`` or ``init FOLDER``."""
    parser = argparse.ArgumentParser(prog="mh-lightning")
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="What there is, a line each.")
    listed.add_argument("kind", choices=KINDS)
    begun = commands.add_parser("init", help="Copy configurations and parts of one's own to begin with.")
    begun.add_argument("folder", type=Path)
    given = parser.parse_args(words)
    if given.command == "list":
        show(KINDS[given.kind]())
    else:
        begin(given.folder)


def show(lines: Iterator[tuple[str, str]]) -> None:
    """Print names and what they are, as a table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = list(lines)
    table.add_column(no_wrap=True, style="bold", min_width=max(len(name) for name, _ in rows))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for line in rows:
        table.add_row(*map(Text, line))  # not markup
    # where nobody looks, such as in a pipe, a line stays a line
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def begin(folder: Path) -> None:
    """Copy a starting point into a folder that is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"error: init: {str(folder)!r} is there and not empty; give a new folder.", file=sys.stderr)
        raise SystemExit(2)
    for name in START:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packaged(CONFIGS) / name, folder / name)
    for part in sorted(packaged(EXAMPLES).glob("*.*")):
        if part.suffix in (".py", ".yaml"):
            shutil.copyfile(part, folder / part.name)
    print(f"""{folder} holds a configuration to begin with, quickstart.yaml, and parts of one's own to change:
  cd {folder}
  mh-lightning fit --config quickstart.yaml
  mh-lightning fit --config all_of_it.yaml       a method, head, backbone, data set, metric and callback of one's own
  tensorboard --logdir runs""")


def first_line(documented: object) -> str:
    """What a docstring begins with, without its marks."""
    text = inspect.getdoc(documented) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0]
    return sentence.partition(": :math:")[0].replace(":math:", "").replace("`", "").rstrip(".:")


def _classes(module: ModuleType, *kinds: type) -> Iterator[tuple[str, str]]:
    for name in sorted(module.__all__):
        made = getattr(module, name)
        if isinstance(made, type) and issubclass(made, kinds) and made not in kinds and not inspect.isabstract(made):
            yield f"{module.__name__}.{name}", first_line(made)


def _methods() -> Iterator[tuple[str, str]]:
    from mh_lightning import methods

    return _classes(methods, methods.ContinualMethod)


def _heads() -> Iterator[tuple[str, str]]:
    from torch import nn

    from mh_lightning import heads, layers

    for room in (layers, heads):
        for name, told in _classes(room, nn.Module):
            made = getattr(room, name.rpartition(".")[2])
            sizes = list(inspect.signature(made).parameters)[:2]
            gives_logits = "forward" in {attribute for base in made.__mro__[:-2] for attribute in vars(base)}
            if gives_logits and sizes in (["in_features", "out_features"], ["num_features", "num_classes"]):
                yield name, told
    yield "torch.nn.Linear", "The plain linear layer"


def _data() -> Iterator[tuple[str, str]]:
    from mh_lightning import data

    return _classes(data, data.StreamDataModule)


def _backbones() -> Iterator[tuple[str, str]]:
    from mh_lightning import backbones

    return _classes(backbones, backbones.Backbone)


def _callbacks() -> Iterator[tuple[str, str]]:
    from lightning.pytorch import Callback

    from mh_lightning import callbacks

    return _classes(callbacks, Callback)


def _metrics() -> Iterator[tuple[str, str]]:
    from mh_lightning.metrics import CALIBRATION, METRICS, AccuracyMatrix, Calibration, functional

    yield "accuracy_matrix", first_line(AccuracyMatrix)
    for name in METRICS:
        yield name, first_line(getattr(functional, name.removesuffix("_clipped")))
    for name in CALIBRATION:
        yield name, first_line(Calibration)


def _configs(kind: str = "") -> Iterator[tuple[str, str]]:
    folder = packaged(CONFIGS)
    for path in sorted((folder / kind).rglob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
        yield str(path.relative_to(folder)), " ".join(line.removeprefix("#").strip() for line in comment)


KINDS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "methods": lambda: itertools.chain(_configs("methods"), _methods()),
    "heads": lambda: itertools.chain(_heads(), _configs("heads")),
    "data": _data,
    "backbones": lambda: itertools.chain(_backbones(), _configs("backbones")),
    "callbacks": _callbacks,
    "metrics": _metrics,
    "streams": partial(_configs, "streams"),
    "tables": partial(_configs, "tables"),
    "configs": _configs,
}
