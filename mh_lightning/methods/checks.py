"""What is wrong with a model or a checkpoint, said before training starts."""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
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
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from mh_lightning.backbones.base import leaving_no_trace
from mh_lightning.callbacks.tasks import TaskBoundaries
from mh_lightning.compat import averages_models_in_between, syncs_batch_norm
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UserError, reason_of
from mh_lightning.resuming import is_same_option

if TYPE_CHECKING:
    from mh_lightning.methods.frame import MethodFrame


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


def check_first_sample(method: "MethodFrame") -> None:
    """Pass the first test sample through the model, which stays what it is.

    Raises:
        UserError: if it does not fit, or the outputs are not finite logits of all classes.
    """
    trainer = method.trainer
    stream: Any = trainer.datamodule  # type: ignore[attr-defined]
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


def check_complete(checkpoint: dict[str, Any], fitting: bool) -> None:
    """Refuse a checkpoint that lacks its place in the stream, so that a fit would start over with trained weights.

    Raises:
        UserError: names what is missing.
    """
    settings = checkpoint.get("optimizer_settings")
    if not isinstance(settings, dict | None):
        raise UserError(f"ckpt_path: the checkpoint's optimizer_settings are damaged, got {settings!r}.")
    loops = checkpoint.get("loops")
    if fitting and not (isinstance(loops, dict) and loops.get("fit_loop")):
        raise UserError(
            "ckpt_path: the checkpoint does not tell where in the stream it was saved, so that no fit can go on from "
            "it; give one of a run folder's checkpoints/."
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
    """Compare the trainer's options in a checkpoint that is resumed with those of the trainer; earlier versions saved
    fewer.

    Raises:
        UserError: names the first that differs.
    """
    if not isinstance(saved, dict):
        raise UserError(f"ckpt_path: the checkpoint's trainer_options are damaged, got {saved!r}.")
    for name, value in own.items():
        if name in saved and not is_same_option(saved[name], value):
            raise UserError(
                f"ckpt_path: the run began with trainer.{name}={saved[name]} and is to go on with {value}, which "
                "cannot change in a run; use the one it began with, or begin anew."
            )


def check_optimizer_settings(saved: dict[str, str] | None, own: dict[str, str]) -> None:
    """Compare the optimizer's settings in a checkpoint, if one is resumed, with those of the configuration.

    Raises:
        UserError: if they differ, since the checkpoint's would silently replace the configuration's.
    """
    changed = [] if saved is None else [name for name in sorted(saved | own) if saved.get(name) != own.get(name)]
    if saved is not None and changed:
        name = changed[0]
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer has {name}={saved.get(name)}, the configuration says "
            f"{own.get(name)}; a resumed run keeps its optimizer, so use the settings it was trained with."
        )


def check_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Compare the shapes of a checkpoint's optimizer state with those of the parameters; torch would do it in the next
    step. A factored state is narrower than its parameter, and L-BFGS keeps one for all of them.

    Raises:
        UserError: if they differ.
    """
    given = [group["params"] for group in state_dict["param_groups"]]
    own = [group["params"] for group in optimizer.param_groups]
    same = [len(one) for one in given] == [len(other) for other in own]
    for group, other in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        same = same and not any(isinstance(group.get(name), str) > isinstance(other[name], str) for name in other)
    if same and not isinstance(optimizer, LBFGS):
        parameters = dict(zip(chain.from_iterable(given), chain.from_iterable(own), strict=True))
        same = all(
            _fits(value, parameters[place])
            for place, state in state_dict["state"].items()
            for value in state.values()
            if isinstance(value, Tensor)
        )
    if not same:
        raise UserError(
            "ckpt_path: the state of the checkpoint's optimizer does not fit the parameters; use the configuration it "
            "was trained with."
        )


def _fits(state: Tensor, parameter: Tensor) -> bool:
    if state.dim() != parameter.dim():  # a number of steps
        return state.numel() == 1
    return all(one in (1, other) for one, other in zip(state.shape, parameter.shape, strict=True))


def check_state(checkpoint: dict[str, Any], architecture: str, num_classes: int, state: dict[str, Tensor]) -> None:
    """Compare a checkpoint's architecture, number of classes and shapes with the model's.

    Raises:
        UserError: if the checkpoint belongs to another configuration.
    """
    saved = checkpoint.get("architecture")
    if saved != architecture:
        raise UserError(
            f"ckpt_path: the checkpoint holds {saved or 'no model of mh_lightning'}, but the "
            f"configuration describes {architecture}; use the configuration it was trained with."
        )
    if checkpoint.get("num_classes") != num_classes:
        raise UserError(
            f"ckpt_path: the checkpoint's model tells {checkpoint.get('num_classes')} classes apart, and the data have "
            f"{num_classes}; give the data that it was trained on."
        )
    weights = checkpoint["state_dict"]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError("ckpt_path: the checkpoint's state_dict must hold tensors by name; it is damaged.")
    for name in sorted(weights.keys() | state.keys()):
        if name not in weights or name not in state or _kind(weights[name]) != _kind(state[name]):
            shapes = [_kind(one[name]) if name in one else "nothing" for one in (weights, state)]
            raise UserError(
                f"ckpt_path: the checkpoint holds {shapes[0]} for {name!r}, but the configuration needs "
                f"{shapes[1]}; use the configuration it was trained with."
            )


def _kind(value: Tensor) -> str:
    """The shape of a tensor, and what numbers it holds if they are no real ones, of any precision."""
    kind = "" if value.is_floating_point() else " of integers"
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        kind = f" of {value.dtype}, {value.layout} on {value.device}"
    return f"{tuple(value.shape)}{kind}"


def check_kept_features(weights: dict[str, Tensor], backbone: nn.Module) -> None:
    """Compare a checkpoint's backbone with the one whose features are kept.

    Raises:
        UserError: if their weights differ, since the features would then be another backbone's.
    """
    for name, value in backbone.state_dict().items():
        saved = weights[f"backbone.{name}"].cpu()
        if not torch.equal(saved, value.cpu().to(saved.dtype)):  # a run in half precision saves that
            raise UserError(
                f"ckpt_path: the checkpoint's backbone has other weights than model.init_args.backbone, in {name!r} "
                "first, so that data.feature_cache would hold the wrong features; give the same weights, or leave the "
                "cache out."
            )
