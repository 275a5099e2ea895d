"""What callbacks ask of a trainer: its stream, where in the stream it is, and its run folder."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from mh_lightning.errors import writing


def stream_of(trainer: Trainer) -> Any:
    """The `StreamDataModule` of the run."""
    return trainer.datamodule  # type: ignore[attr-defined]


def current_task(trainer: Trainer) -> int:
    """The task of the current epoch, from 0."""
    task: int = stream_of(trainer).task_of_epoch(trainer.current_epoch)
    return task


def starts_task(trainer: Trainer) -> bool:
    """Whether the current epoch is the first of its task."""
    epochs: int = stream_of(trainer).epochs_per_task
    return trainer.current_epoch % epochs == 0


def ends_task(trainer: Trainer) -> bool:
    """Whether the current epoch is the last of its task."""
    epochs: int = stream_of(trainer).epochs_per_task
    return (trainer.current_epoch + 1) % epochs == 0


def is_fitting(trainer: Trainer) -> bool:
    """Whether a fit is under way, the evaluations inside it included, the sanity check before it not."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    trial: bool | int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(trial)


def run_folder(trainer: Trainer) -> Path:
    """Where the run keeps its files: `default_root_dir` where it was given, else the logger's folder.

    All ranks must ask, since rank 0 tells the others.
    """
    folder = trainer.default_root_dir
    if Path(folder) == Path.cwd():
        folder = trainer.log_dir or folder
    return Path(trainer.strategy.broadcast(folder))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; it is there as a whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(partial, dpi=150)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def show_figure(trainer: Trainer, name: str, figure: Figure, path: Path) -> None:
    """Write a figure of the whole run to `path`, and show it in TensorBoard; on rank 0."""
    if not trainer.is_global_zero:
        return
    save_figure(figure, path)
    figure.clear()  # else its arrays wait for the garbage collector
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
            logger.experiment.add_image(name, pixels, stream_of(trainer).num_tasks, dataformats="HWC")
