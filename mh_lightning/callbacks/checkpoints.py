"""Checkpoints: the newest state, and one a task."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mh_lightning.callbacks.run import current_task, ends_task, is_trial, run_folder
from mh_lightning.errors import writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place and then moves it there, so that no half-written one is ever found.

    Lightning's own writer goes through the temporary folder, and a move between file systems is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file in the same folder, flush it to disk, rename it."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with writing(target):
            try:
                super().save_checkpoint(checkpoint, temporary, storage_options)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)


class TaskCheckpoints(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` in the run folder after each epoch, and ``checkpoints/task_<i>.ckpt``, from 1,
    after each task. ``--ckpt_path`` takes any of them; resuming goes on at the next epoch.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if is_trial(trainer) or not trainer.is_last_batch:  # an epoch that was cut short cannot be gone on with
            return
        folder = run_folder(trainer) / "checkpoints"
        last = folder / "last.ckpt"
        if trainer.is_global_zero:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(last, weights_only=False)  # all state, not the weights alone
        if trainer.is_global_zero and ends_task(trainer):
            name = f"task_{current_task(trainer) + 1}"
            copy = folder / f".{name}.tmp"
            with writing(folder / f"{name}.ckpt"):
                try:
                    shutil.copyfile(last, copy)
                    copy.replace(folder / f"{name}.ckpt")
                finally:
                    copy.unlink(missing_ok=True)
