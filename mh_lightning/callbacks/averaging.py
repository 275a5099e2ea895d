"""Lightning's callbacks that average weights, on a stream of tasks."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from mh_lightning.callbacks.run import stream_of
from mh_lightning.compat.lightning_names import averaged_model
from mh_lightning.compat.torch_names import BatchNorm
from mh_lightning.errors import UserError
from mh_lightning.layers.auto_scale import AutoScale
from mh_lightning.layers.key_memory import KeyMemory

HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Those of the trainer's callbacks that average weights."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if isinstance(one, WeightAveraging | StochasticWeightAveraging)]


def prepare_averaging(trainer: Trainer, method: Any, boundaries: Callback) -> None:
    """Make the head, in the trainer's precision, before a callback copies the method to average it.

    Raises:
        UserError: if an average would not be one of what the run learns, or has copied the method already.
    """
    for callback in averaging_callbacks(trainer):
        _check(callback, trainer, method)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks.index(callback) < callbacks.index(boundaries):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} copies the method before TaskBoundaries has prepared "
                "it; give TaskBoundaries first."
            )
        with trainer.precision_plugin.module_init_context():
            method.configure_model()
        trainer.precision_plugin.convert_module(method)


def _check(callback: Callback, trainer: Trainer, method: Any) -> None:
    stochastic = isinstance(callback, StochasticWeightAveraging)
    reason = None
    if stream_of(trainer).chunk_size is not None:
        reason = "data.chunk_size learns many steps at once, of which an average would see the last; leave it out"
    elif method.weights_change_outside_of_steps():
        reason = f"{type(method).__name__} also learns outside of the optimizer's steps, which no average of them sees"
    elif trainer.precision in HALF:
        reason = f"an average in trainer.precision={trainer.precision} would not move; take bf16-mixed or 32-true"
    elif stochastic and method.reset_optimizer:
        reason = "model.init_args.reset_optimizer would undo its learning rates at each task; leave it out"
    elif stochastic and any(isinstance(one, BatchNorm) for one in method.modules()):
        reason = "it would learn BatchNorm's averages anew, from the last task alone; take EMAWeightAveraging"
    if reason is not None:
        raise UserError(f"trainer.callbacks: {type(callback).__name__} cannot be used here, since {reason}.")


@torch.no_grad()
def keep_what_is_no_average(trainer: Trainer, method: Any) -> None:
    """Give running averages the state of now in all that has no average: integers, such as counters, and what is not
    trained, such as a frozen backbone and a replay buffer. Before the first step is averaged, that is all.

    To be called before an average is used or saved.
    """
    for callback in averaging_callbacks(trainer):
        running = averaged_model(callback) if isinstance(callback, WeightAveraging) else None
        if running is not None:
            averaged = set() if running.n_averaged == 0 else names_averaged(method)
            states = (one.state_dict(keep_vars=True) for one in (running.module, method))
            average, own = states
            for name in own.keys() - averaged:
                average[name].detach().copy_(own[name])


def names_averaged(method: Any) -> set[str]:
    """What a running average of a method is taken of: the parameters that the optimizer trains, keys and scales of
    Memory Heads, and the averages of BatchNorm in a backbone that is trained.
    """
    trained = {id(one) for one in method.head_parameters_to_train()}
    trained |= {id(one) for one in method.backbone.parameters() if one.requires_grad}
    tuned = any(one.requires_grad for one in method.backbone.parameters())
    moving = [one for one in method.modules() if isinstance(one, KeyMemory | AutoScale)]
    moving += [*method.backbone.modules()] if tuned else []
    buffers = {id(one) for module in moving for one in module.buffers(recurse=False) if one.is_floating_point()}
    return {name for name, value in method.state_dict(keep_vars=True).items() if id(value) in trained | buffers}
