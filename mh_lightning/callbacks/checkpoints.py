"""Checkpoints: the newest state, and one a task."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mh_lightning.callbacks.averaging import averaging_callbacks
from mh_lightning.callbacks.run import current_task, ends_task, is_trial, refuse_to_overwrite, run_folder, stream_of
from mh_lightning.callbacks.stop_signal import StopSignal
from mh_lightning.compat.lightning_names import is_accumulating
from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import require, writing
from mh_lightning.files import as_a_whole
from mh_lightning.run_folders import CHECKPOINTS

WAITING = ".last.ckpt.tmp"  # whole, but not yet in its place


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place and then moves it there, so that no half-written one is ever found.

    Lightning's own writer goes through the temporary folder, and a move between file systems is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file in the same folder, flush it to disk, rename it."""
        target = Path(path)
        with writing(target):
            with as_a_whole(target) as partial:
                super().save_checkpoint(checkpoint, partial, storage_options)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    """Let the file system keep the new name, too, should the power fail."""
    with suppress(OSError):  # Windows opens no folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class TaskCheckpoints(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` in the run folder after each epoch, and in the middle of a long one, and
    ``checkpoints/task_<i>.ckpt``, from 1, after each task. ``--ckpt_path`` takes any of them. Where the stream is
    evaluated after every n tasks only, checkpoints are saved after every n epochs and n tasks.

    A resumed run ends as if it had not been stopped, wherever that was: bit for bit on the CPU with the same number of
    processes. SIGTERM saves after the optimizer step, or the evaluation, that is under way, and ends the run.

    Args:
        minutes: at least 0: at most so long between two checkpoints in the middle of an epoch; 0 saves after each
            optimizer step.

    Raises:
        UserError: if `minutes` is negative, or the run folder holds checkpoints of another run.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        require("TaskCheckpoints: minutes", minutes, at_least=0)
        self.minutes = minutes
        self._signal = StopSignal()
        self._saved = 0.0  # when, by the clock
        self._waiting, self._stops = False, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the checkpoints of another run alone."""
        refuse_to_overwrite(trainer, f"{CHECKPOINTS}/*.ckpt")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what was not written to its end, start the clock, and listen for SIGTERM."""
        folder = run_folder(trainer) / CHECKPOINTS
        if trainer.is_global_zero and not is_trial(trainer):
            for partial in folder.glob(".*.tmp"):
                partial.unlink(missing_ok=True)
        self._waiting = self._stops = False
        self._saved = time.monotonic()
        self._signal.listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time, or the run is asked to stop, and no gradient is half gathered."""
        # after the last batch the checkpoint of the epoch comes, when the task was evaluated
        if is_trial(trainer) or trainer.is_last_batch or is_accumulating(trainer):
            return
        save = self._is_due(trainer, pl_module)
        if save or self._stops:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the checkpoint of the batch before into its place, now that the batch was logged; and stop if asked."""
        if self._waiting:
            self._put_into_place(trainer)
        if self._stops:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if that was asked for and there is more to do."""
        if is_trial(trainer) or not trainer.is_last_batch:  # an epoch that was cut short cannot be gone on with
            return
        every = stream_of(trainer).evaluate_every_n_tasks
        evaluated = ends_task(trainer) and stream_of(trainer).evaluates_after(current_task(trainer))
        due = self._is_due(trainer, pl_module)
        if due or self._stops or evaluated or (trainer.current_epoch + 1) % every == 0:
            waiting = self._save(trainer)
            if trainer.is_global_zero and evaluated:  # first, since nobody comes back here after last.ckpt
                self._copy(waiting, f"task_{current_task(trainer) + 1}")
            self._put_into_place(trainer)
        if self._stops and trainer.current_epoch + 1 != trainer.max_epochs:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A limit, such as `trainer.max_steps`, may end the run in the middle of an epoch; and weights that are
        averaged at the end only are not in the checkpoint of the last epoch.
        """
        averages = [one for one in averaging_callbacks(trainer) if isinstance(one, StochasticWeightAveraging)]
        if averages and trainer.current_epoch == trainer.max_epochs and not is_trial(trainer):
            self._save(trainer)
            rank_zero_warn(
                "StochasticWeightAveraging: the accuracies are of the weights before they were averaged; last.ckpt "
                "holds the average, which `test --ckpt_path last` evaluates."
            )
        if self._waiting:
            self._put_into_place(trainer)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether to save now; also notes SIGTERM. Ranks have clocks and signals of their own, and agree."""
        due = time.monotonic() - self._saved >= 60 * self.minutes
        wishes = torch.tensor([self._signal.received, due and trainer.is_global_zero], device=pl_module.device)
        self._stops, agreed = (bool(wish) for wish in sum_over_ranks(wishes.int()).tolist())
        return agreed

    def _save(self, trainer: Trainer) -> Path:
        folder = run_folder(trainer) / CHECKPOINTS
        if trainer.is_global_zero:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(folder / WAITING, weights_only=False)  # all state, not the weights alone
        self._saved, self._waiting = time.monotonic(), True
        return folder / WAITING

    @staticmethod
    def _copy(checkpoint: Path, name: str) -> None:
        target = checkpoint.with_name(f"{name}.ckpt")
        with writing(target), as_a_whole(target) as partial:
            shutil.copyfile(checkpoint, partial)

    def _put_into_place(self, trainer: Trainer) -> None:
        """After the logs, since a resumed run logs only what comes after its checkpoint."""
        self._waiting = False
        folder = run_folder(trainer) / CHECKPOINTS
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
                else:
                    logger.save()
            with writing(folder / "last.ckpt"):
                (folder / WAITING).replace(folder / "last.ckpt")
            _flush_folder(folder)
