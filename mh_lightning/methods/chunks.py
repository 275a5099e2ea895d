"""Learning a whole chunk of the stream in one training step: optimizer steps without the trainer's cost for each."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mh_lightning.errors import UserError
from mh_lightning.methods.steps import OptimizerStep, bare_step
from mh_lightning.resuming import is_same_option

if TYPE_CHECKING:
    from mh_lightning.methods.base import Batch, ContinualMethod, Learnt


def check_trainer_of_chunks(trainer: Trainer) -> None:
    """Refuse what the trainer would have done in its optimization.

    Raises:
        UserError: names the trainer's option or the kind of optimizer or scheduler.
    """
    for option, given, plain in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("gradient_clip_val", trainer.gradient_clip_val or None, None),
        ("precision", trainer.precision, "32-true"),
        ("max_steps", trainer.max_steps, -1),
        ("limit_train_batches", trainer.limit_train_batches, 1.0),
    ):
        if not is_same_option(given, plain):
            raise UserError(f"trainer.{option}={given} cannot be combined with data.chunk_size; leave one of them out.")
    for kind in (*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)):
        if isinstance(kind, torch.optim.LBFGS | ReduceLROnPlateau):
            raise UserError(
                f"data.chunk_size cannot be combined with {type(kind).__name__}, which needs the trainer at each "
                "step; leave one of them out."
            )


def learn_chunk(method: "ContinualMethod", chunk: "Batch", batch_size: int) -> "Learnt":
    """Learn a chunk in optimizer steps of `batch_size`, as the trainer would."""
    optimizer = method.trainer.optimizers[0]
    learn = OptimizerStep(optimizer, bare_step(optimizer), adjust=method.adjust_gradients)
    losses: list[Tensor] = []
    logits: list[Tensor] = []
    for batch in zip(*(torch.split(part, batch_size) for part in chunk), strict=True):
        loss, logits_of_batch = method.training_loss(batch)
        learn(loss)
        losses.append(loss.detach())
        logits.append(logits_of_batch.detach())
    _count_optimizer_steps(method, len(losses))
    return {"correct": method.log_training(torch.stack(losses).mean(), torch.cat(logits), chunk[1])}


def _count_optimizer_steps(method: "ContinualMethod", steps: int) -> None:
    """Let the trainer's global step count optimizer steps, though it did not take them."""
    progress = method.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for tracker in (progress.total, progress.current):
        tracker.ready += steps
        tracker.completed += steps
    method.log("step", float(method.global_step))  # the axis of the logged curves
