"""Whether a trainer suits a method, said before training starts, and what it is told that a fit cannot change."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mh_lightning.backbones.base import leaving_no_trace
from mh_lightning.callbacks.tasks import TaskBoundaries
from mh_lightning.compat.lightning_names import averages_models_in_between, syncs_batch_norm
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UserError, reason_of
from mh_lightning.option_roles import is_same_option


def check_trainer(trainer: Trainer) -> None:
    """See that a trainer has a stream, and in a fit the callback that lays it out.

    Raises:
        UserError: names what to give.
    """
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(stream, StreamDataModule):
        given = "loaders" if stream is None else type(stream).__name__
        raise UserError(
            f"A method learns a stream, and the trainer was given {given}; give it a "
            "mh_lightning.data.StreamDataModule, such as mh_lightning.data.Tensors, as the datamodule."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.state.fn == "fit" and not any(isinstance(one, TaskBoundaries) for one in callbacks):
        raise UserError(
            "trainer: lightning.pytorch.Trainer does not lay the tasks of a stream out over its epochs; use "
            "mh_lightning.Trainer, or add mh_lightning.callbacks.TaskBoundaries to its callbacks."
        )


def check_borders(method: Any, announces_tasks: bool) -> None:
    """Compare a method with what its stream tells.

    Raises:
        UserError: if the method, or an option of it, needs borders of tasks that the stream does not tell.
    """
    if announces_tasks:
        return
    silent = "the stream does not tell where tasks begin and end (data.blurry_borders, or data.announces_tasks=false)"
    if method.needs_task_borders:
        raise UserError(
            f"model: {type(method).__name__} needs the borders of tasks, and {silent}; take a method that learns "
            "without them, such as ClosedForm, ExperienceReplay or DERPlusPlus."
        )
    if method.classes_in_loss == "task" or method.reset_optimizer:
        option = "reset_optimizer=true" if method.reset_optimizer else "classes_in_loss=task"
        raise UserError(f"model.init_args.{option}: {silent}; leave it out.")


def check_strategy(strategy: Strategy) -> None:
    """Compare a trainer's strategy with those under which every rank holds the whole state.

    Raises:
        UserError: if it is another one.
    """
    others = DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy) or isinstance(strategy, others):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} does not let each rank keep and train the whole model, which "
            "Memory Heads, replay buffers and class statistics need; use ddp."
        )
    if isinstance(strategy, DDPStrategy) and averages_models_in_between(strategy):
        raise UserError(
            "trainer.strategy: with model_averaging_period, ranks hold different models between two averages; leave it "
            "out."
        )


def check_first_sample(method: LightningModule) -> None:
    """Pass the first test sample through the model, which stays what it is.

    Raises:
        UserError: if it does not fit, or the outputs are not finite logits of all classes.
    """
    trainer = method.trainer
    stream: StreamDataModule = trainer.datamodule  # type: ignore[attr-defined]
    x = stream.first_input().to(method.device)
    try:
        with leaving_no_trace(method), trainer.precision_plugin.forward_context():
            logits = method(trainer.precision_plugin.convert_input(x))
        finite = bool(logits.isfinite().all())
    except UserError:
        raise
    except (RuntimeError, TypeError, LookupError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"model: the first test sample, of shape {tuple(x.shape[1:])}, does not pass through "
            f"model.init_args.backbone and model.init_args.head ({reason_of(error)})."
        ) from error
    if logits.shape != (1, stream.num_classes):
        raise UserError(
            f"model.init_args.head gives an output of shape {tuple(logits.shape)} for one sample; it must be "
            f"(1, {stream.num_classes}), a logit for each class."
        )
    if not finite:
        raise UserError(
            "model: the features or outputs of the first test sample hold NaN or infinite values; check "
            "model.init_args.backbone's weights, the checkpoint and the data."
        )


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


def trainer_options(trainer: Trainer) -> dict[str, Any]:
    """What a trainer is told that changes the numbers of a fit and stays the same throughout it, as plain values."""
    algorithm = trainer.gradient_clip_algorithm
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # by epoch where a callback says so, since the trainer has that of the epoch then
    accumulated = [one.scheduling for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    averaging = [one for one in callbacks if isinstance(one, WeightAveraging | StochasticWeightAveraging)]
    return {
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": None if algorithm is None else str(algorithm.value),
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
        "overfit_batches": trainer.overfit_batches,  # type: ignore[attr-defined]
        "accumulate_grad_batches": accumulated[0] if accumulated else trainer.accumulate_grad_batches,
        "sync_batchnorm": syncs_batch_norm(trainer),
        "callbacks": sorted(type(one).__name__ for one in averaging),
    }


def check_trainer_options(saved: Any, own: dict[str, Any]) -> None:
    """Compare the trainer's options in a checkpoint that is resumed with those of the trainer.

    Raises:
        UserError: names the first that differs.
    """
    if not isinstance(saved, dict):
        raise UserError(f"ckpt_path: the checkpoint's trainer_options are damaged, got {saved!r}.")
    for name, value in own.items():
        if not is_same_option(saved.get(name), value):
            raise UserError(
                f"ckpt_path: the run began with trainer.{name}={saved.get(name)} and is to go on with {value}, which "
                "cannot change in a run; use the one it began with, or begin anew."
            )
