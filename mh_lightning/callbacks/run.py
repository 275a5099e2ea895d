"""What callbacks ask of a trainer: its stream, where in the stream it is, and its run folder."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UserError, writing
from mh_lightning.files import as_a_whole
from mh_lightning.run_folders import CHECKPOINTS


def stream_of(trainer: Trainer) -> StreamDataModule:
    """The stream of the run."""
    stream: StreamDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return stream


def current_task(trainer: Trainer) -> int:
    """The task of the current epoch, from 0."""
    return stream_of(trainer).task_of_epoch(trainer.current_epoch)


def starts_task(trainer: Trainer) -> bool:
    """Whether the current epoch is the first of its task."""
    return trainer.current_epoch % stream_of(trainer).epochs_per_task == 0


def ends_task(trainer: Trainer) -> bool:
    """Whether the current epoch is the last of its task."""
    return (trainer.current_epoch + 1) % stream_of(trainer).epochs_per_task == 0


def is_fitting(trainer: Trainer) -> bool:
    """Whether a fit is under way, the evaluations inside it included, the sanity check before it not."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    trial: bool | int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(trial)


def what_cut_it_short(trainer: Trainer) -> str:
    """The option by which a fit ended before its stream, or left out its evaluations."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    remaining = [one.time_remaining() for one in callbacks if isinstance(one, Timer)]
    if not trainer.limit_val_batches:
        return f"trainer.limit_val_batches={trainer.limit_val_batches} leaves evaluation out"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} was reached"
    if any(seconds is not None and seconds <= 0 for seconds in remaining):
        return "the time of trainer.max_time was over"
    return "one of trainer.callbacks stopped it"


def run_folder(trainer: Trainer) -> Path:
    """Where the run keeps its files: `default_root_dir` where it was given, else the logger's folder.

    All ranks must ask, since rank 0 tells the others. On the command line it is always a version folder of its own.
    """
    folder = trainer.default_root_dir
    if Path(folder) == Path.cwd():
        folder = trainer.log_dir or folder
    return Path(trainer.strategy.broadcast(folder))


def refuse_to_overwrite(trainer: Trainer, pattern: str) -> None:
    """See that the run folder holds no such files of another run; a run that goes on in its folder may have them.

    All ranks must call it, when a checkpoint has been loaded if there is one, and before anything is written.

    Args:
        trainer: of the run.
        pattern: of the names of files that the run will write, below its folder.

    Raises:
        UserError: names the first of them.
    """
    folder, checkpoint = run_folder(trainer), trainer.ckpt_path
    goes_on = checkpoint is not None and Path(checkpoint).parent.resolve() == (folder / CHECKPOINTS).resolve()
    there = sorted(folder.glob(pattern)) if trainer.is_global_zero and not goes_on and not is_trial(trainer) else []
    names = trainer.strategy.broadcast([str(path) for path in there])
    if names:
        raise UserError(
            f"{names[0]!r} is of another run, and would be overwritten; give the trainer another default_root_dir, or "
            "fit with a ckpt_path in that run's folder to go on with it."
        )


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; it is there as a whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_a_whole(path) as partial:
            figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))


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
