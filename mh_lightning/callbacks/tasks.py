"""Task boundaries, and the progress bar that tells where in the stream a run is."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from mh_lightning.callbacks.run import current_task, ends_task, is_trial, starts_task, stream_of
from mh_lightning.errors import UserError


class TaskBoundaries(Callback):
    """Lays the stream out over the epochs of one fit, and tells the method where tasks start and end.

    The number of epochs follows from the stream, and evaluation takes place after each task. At the start of a task
    the optimizer and the scheduler are made anew if the method asks for it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the trainer's number of epochs and its rhythm of evaluation."""
        if stage != "fit":
            return
        stream, loop = stream_of(trainer), trainer.fit_loop
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if reload != 1:
            raise UserError(
                f"trainer.reload_dataloaders_every_n_epochs must be 1, since each task has its own data; got {reload}."
            )
        for name, allowed, reason in (
            ("val_check_interval", (None, 1.0), "each task is evaluated once, at its end"),
            ("check_val_every_n_epoch", (1, stream.epochs_per_task), "it follows from data.epochs_per_task"),
            ("limit_val_batches", (None, 0, 1.0), "data.max_test_samples takes a part of each class"),
        ):
            value = getattr(trainer, name, "a duration")  # which Lightning keeps elsewhere
            if value not in allowed and not is_trial(trainer):
                raise UserError(f"trainer.{name}={value}: leave it out, {reason}.")
        if trainer.accumulate_grad_batches < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}."
            )
        epochs = stream.num_tasks * stream.epochs_per_task
        if trainer.max_epochs in (-1, None):
            loop.max_epochs = epochs
        elif trainer.max_epochs != epochs and not is_trial(trainer):
            raise UserError(
                f"trainer.max_epochs={trainer.max_epochs} contradicts the stream's {stream.num_tasks} tasks "
                f"of {stream.epochs_per_task} epochs; leave it out, it follows from them."
            )
        trainer.check_val_every_n_epoch = stream.epochs_per_task

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce and prepare a task at its first epoch. Each epoch draws its own random numbers, so that a resumed
        run draws the same.
        """
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            _seed_all(int(seed), trainer.current_epoch, trainer.global_rank)
        if not starts_task(trainer):
            return
        stream, method, task = stream_of(trainer), _method(pl_module), current_task(trainer)
        pl_module.print(
            f"Task {task + 1} of {stream.num_tasks}: {stream.name_of_task(task)} "
            f"({stream.num_samples('train', task)} samples)"
        )
        if method.reset_optimizer and task > 0:
            trainer.strategy.setup_optimizers(trainer)
        method.on_task_start(task)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the method that a task ends, before it is evaluated."""
        if trainer.is_last_batch and ends_task(trainer):
            _method(pl_module).on_task_end(current_task(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the method as a run that ended leaves it."""
        pl_module.on_fit_end()
        _method(pl_module).leave_stream()


def _seed_all(*parts: int) -> None:
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(parts).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))  # noqa: NPY002  # transforms of other packages draw from it
    random.seed(int(python_seed))


def _method(pl_module: LightningModule) -> Any:
    return pl_module


class TaskProgressBar(TQDMProgressBar):
    """Progress bar that says task i of T."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows, without the version of the run folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the task and the epoch in front of the bar."""
        super().on_train_epoch_start(trainer)
        stream = stream_of(trainer)
        task, epoch = divmod(trainer.current_epoch, stream.epochs_per_task)
        self.train_progress_bar.set_description(
            f"Task {task + 1} of {stream.num_tasks}, epoch {epoch + 1} of {stream.epochs_per_task}"
        )
