"""What is wrong around a run: folders, disks and ports."""

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from mh_lightning.cli import main
from tests.bad_input.table import DATA, MODEL, TRAINER, Place, Row, check, place, table
from tests.bad_input.test_data import image_config
from tests.data.packed import images_of, write_files

__all__ = ["place"]


class Remover(Callback):
    """Removes the run folder when the second task starts, and may put a file in its place."""

    def __init__(self, file: bool = False) -> None:
        self.file = file

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            folder = Path(trainer.default_root_dir)
            shutil.rmtree(folder)
            if self.file:
                folder.write_text("in the way")


REMOVER = f"{TRAINER}callbacks+={Remover.__module__}.Remover"
LOGGERS = (f"{TRAINER}logger", "true")


def full_disk(*names: str) -> Any:
    """The disk is full for files of these names."""

    def prepare(place: Place) -> list[str]:
        def fails(write: Any) -> Any:
            def wrapped(first: Any, *rest: Any, **options: Any) -> Any:
                path = next((str(one) for one in (first, *rest) if isinstance(one, Path | str)), "")
                if any(name in path for name in names):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(first, *rest, **options)

            return wrapped

        place.patch.setattr(Path, "write_bytes", fails(Path.write_bytes))
        place.patch.setattr(Figure, "savefig", fails(Figure.savefig))
        place.patch.setattr(os, "fsync", lambda file: fails(lambda path: None)(os.readlink(f"/proc/self/fd/{file}")))
        return []

    return prepare


def in_use(place: Place) -> list[str]:
    taken = socket.socket()
    taken.bind(("0.0.0.0", 0))
    taken.listen()
    place.patch.setattr(place.patch, "socket", taken, raising=False)  # open until the test ends
    place.patch.setenv("MASTER_ADDR", "127.0.0.1")
    place.patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
    return [f"{TRAINER}strategy", "ddp", f"{TRAINER}devices", "1"]


def no_port(place: Place) -> list[str]:
    place.patch.setenv("MASTER_PORT", "http")
    return []


def features(place: Place, folder: Path) -> list[Any]:
    root = place.folder / "images"
    write_files(root, images_of({f"{split}/{kind}": 1 for split in ("train", "test") for kind in ("apple", "pear")}))
    return [*image_config(place, "ImageFolder", root), f"{DATA}feature_cache.folder={folder}"]


def full_of_features(place: Place) -> list[Any]:
    full_disk(".safetensors.")(place)
    return features(place, place.folder / "features")


ROWS = (
    Row("run_dir is a file", lambda place: ["--run_dir", place.config], "run_dir: the run folder .* cannot be made"),
    Row("run_dir is under a file", lambda place: ["--run_dir", place.config / "x"], "cannot be made .Not a directory"),
    Row("run_dir cannot be written", ["--run_dir", "/proc/nowhere"], "run_dir: the run folder .* cannot be made"),
    Row("name is too long", ["--experiment", "x" * 300], "run_dir: the run folder .* cannot be made .File name too"),
    Row("root folder cannot be made", ["--run_dir", "/proc/x", f"{TRAINER}default_root_dir", "/proc/x"],
        "run_dir: the run folder '/proc/x/tiny' cannot be made"),
    Row("two folders of all runs", [f"{TRAINER}default_root_dir", "/proc/x"],
        "run_dir=.* and trainer.default_root_dir='/proc/x' are two names"),
    Row("logger writes into a file", lambda place: [f"{TRAINER}logger=CSVLogger",
        f"{TRAINER}logger.save_dir={place.config}"], "'.*tiny.yaml.*' cannot be read or written .Not a directory"),
    Row("logger has no folder", [f"{TRAINER}logger=TensorBoardLogger", f"{TRAINER}logger.save_dir=/proc/x"],
        "'/proc/x.*' cannot be read or written"),
    Row("features go into a file", lambda place: features(place, place.config), "feature_cache.folder: .*cannot be"),
    Row("no room for features", full_of_features, "a shard cannot be written.*No space left"),
    Row("no room for checkpoints", full_disk("last.ckpt"), "last.ckpt.tmp' cannot be .*No space left", trained=True),
    Row("no room for results", full_disk("results.json"), "results.json' cannot be .*No space left", trained=True),
    Row("file in place of the folder", [REMOVER, f"{TRAINER}callbacks.file=true"], "version_0/checkpoints' cannot be "
        "written .Not a directory", trained=True),
    Row("folder removed, with loggers", [REMOVER, *LOGGERS], "version_0/.*' cannot be read or written .No such file",
        trained=True),
    Row("port in use", in_use, "cannot meet at 127.0.0.1:[0-9]+ .*MASTER_PORT"),
    Row("port is a word", no_port, "MASTER_PORT must be a port from 0 to 65535, got 'http'"),
)  # fmt: skip


@table(*ROWS)
def test_one_sentence(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(row, place, capsys)


def test_results_are_whole_where_there_is_no_room_for_figures(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    full_disk(".png")(place)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(place.config), "--run_dir", str(place.folder / "runs"), "--pictures", "true"])
    assert ended.value.code == 2
    assert "accuracy_matrix.png' cannot be written (No space left on device)" in capsys.readouterr().err
    (folder,) = place.folder.rglob("version_0")
    assert (folder / "results.json").read_text().endswith("}\n") and not list(folder.glob("*.png"))


def test_a_run_folder_that_is_removed_is_made_again(place: Place) -> None:
    head = (f"{MODEL}head", "torch.nn.Linear")
    main(["fit", "--config", str(place.config), "--run_dir", str(place.folder / "runs"), REMOVER, *head])
    (folder,) = place.folder.rglob("version_0")
    names = {path.name for path in folder.rglob("*")}
    assert {"results.json", "last.ckpt", "task_2.ckpt"} <= names and "task_1.ckpt" not in names
