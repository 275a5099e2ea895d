"""What a row of the tables is, what it may use, and what must hold for each."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mh_lightning.cli import main

TINY = """
seed_everything: 3
pictures: false
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone: {class_path: mh_lightning.backbones.Identity, init_args: {num_features: 3}}
    head: {class_path: mh_lightning.MHLinear, init_args: {key_mem_units: 4, delta: 2, upd_m: WTA, upd_k: ad_hoc_WTA}}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: mh_lightning.data.TensorFile
  init_args: {path: PATH, increment: 2, batch_size: 4}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false}
"""
HEAD, OPTIMIZER = "--model.init_args.head.init_args.", "--model.init_args.optimizer.init_args."
MODEL, DATA, TRAINER = "--model.init_args.", "--data.init_args.", "--trainer."


class Bomb:
    """Unpickling this makes the folder `executed`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


class Place(NamedTuple):
    """An empty folder of a row's own, with a good configuration in it."""

    folder: Path
    patch: pytest.MonkeyPatch

    @property
    def bomb(self) -> Bomb:
        """Must not go off."""
        return Bomb(self.folder / "executed")

    @property
    def config(self) -> Path:
        """A good one."""
        return self.folder / "tiny.yaml"

    def write(self, name: str, content: bytes | str) -> Path:
        """A file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def changed(self, **parts: Any) -> Path:
        """The configuration with some of its parts replaced."""
        settings = yaml.safe_load(self.config.read_text()) | parts
        return self.write("changed.yaml", yaml.safe_dump(settings))


def tensors() -> dict[str, Tensor]:
    """Four classes of four samples."""
    y = torch.arange(4).repeat(4)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) + y[:, None]
    return {"x_train": x, "y_train": y, "x_test": x.clone(), "y_test": y.clone()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Imported by the modules of tables."""
    save_file(tensors(), tmp_path / "tensors.safetensors")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PATH", str(tmp_path / "tensors.safetensors")))
    return Place(tmp_path, monkeypatch)


class Row(NamedTuple):
    """One kind of bad input.

    Attributes:
        name: what is wrong.
        arguments: of a fit of the good configuration, or what prepares the place and gives them; with "--config" or a
            subcommand among them, they are all.
        sentence: a regular expression that is found in what the user reads.
        trained: whether the run has begun by then, so that its folder stays.
    """

    name: str
    arguments: Sequence[str] | Callable[[Place], Sequence[Any]]
    sentence: str
    trained: bool = False


def table(*rows: Row) -> pytest.MarkDecorator:
    """A test for each row."""
    assert len({row.name for row in rows}) == len(rows)
    return pytest.mark.parametrize("row", rows, ids=[row.name.replace(" ", "-") for row in rows])


def check(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command line on a row, and see that it ends as it must."""
    arguments = [str(one) for one in (row.arguments(place) if callable(row.arguments) else row.arguments)]
    if not arguments or arguments[0].startswith("--"):
        config = [] if "--config" in arguments else ["--config", str(place.config)]
        arguments = ["fit", *config, *arguments]
    runs = place.folder / "runs"
    if "--run_dir" not in arguments and len(arguments) > 1:
        arguments += ["--run_dir", str(runs)]
    place.patch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    place.patch.undo()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("[rank")]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    assert re.search(row.sentence, lines[0]), lines[0]
    assert len(lines[0]) < 700
    assert not (place.folder / "executed").exists()
    left = {path.name for path in runs.rglob("*")}
    assert not {"results.json", ".results.json.tmp"} & left and not any(name.endswith(".tmp") for name in left)
    assert row.trained or not list(runs.rglob("version_*/*"))
