"""How a method's optimizer and scheduler are made, with a learning rate and a weight decay of the backbone's own."""

import math
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mh_lightning.backbones import Backbone
from mh_lightning.errors import UserError
from mh_lightning.layers import MHLinear
from mh_lightning.optimizer import memory_head_optimizer

FACTOR = "learning_rate_factor"  # of a parameter group, until its learning rate is multiplied by it


class Trained(LightningModule, ABC):
    """What an optimizer is made for: a module with a backbone, and a head that may be trained in part.

    Attributes:
        backbone: whose parameter groups may have learning rates of their own.
        only_touched_units: whether memory units without a gradient are left alone.
    """

    backbone: Backbone
    only_touched_units: bool

    @abstractmethod
    def head_parameters_to_train(self) -> list[nn.Parameter]:
        """What the optimizer trains besides the backbone's parameters."""

    @abstractmethod
    def memory_heads(self) -> dict[str, MHLinear]:
        """The Memory Heads by their names."""


def make_optimizer(make: OptimizerCallable, method: Trained) -> Optimizer:
    """An optimizer over the parameters that a method trains.

    Args:
        make: makes it from parameters or parameter groups.
        method: what is trained: its backbone's `parameter_groups` and its `head_parameters_to_train`.

    Raises:
        UserError: if the method's options need what the optimizer does not do.
    """
    params = parameters_or_groups(method)
    optimizer = _optimizer_of_touched_units(make, method, params) if method.only_touched_units else make(params)
    for group in optimizer.param_groups:
        if FACTOR in group:
            group["lr"] = group["lr"] * group.pop(FACTOR)
        if group.get("weight_decay") is not None and "weight_decay" not in optimizer.defaults:
            raise UserError(
                f"{type(optimizer).__name__} has no weight decay, so backbone.weight_decay={group['weight_decay']} "
                "would do nothing; leave it out."
            )
    return optimizer


def parameters_or_groups(method: Trained) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters that a method trains, in one list, or in groups if the backbone's are treated in their own way:
    first what is not the backbone's, then the backbone's groups in their order.
    """
    groups = [group for group in method.backbone.parameter_groups() if group.parameters]
    head = method.head_parameters_to_train()
    if all(group.learning_rate_factor == 1 and group.weight_decay is None for group in groups):
        trained = {id(parameter) for group in groups for parameter in group.parameters} | set(map(id, head))
        return [parameter for parameter in method.parameters() if id(parameter) in trained]
    params: list[dict[str, Any]] = [{"params": head}] if head else []
    for group in groups:
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        params.append({"params": group.parameters, FACTOR: group.learning_rate_factor, **decay})
    return params


def _optimizer_of_touched_units(
    make: OptimizerCallable, method: Trained, params: list[nn.Parameter] | list[dict[str, Any]]
) -> Optimizer:
    if not any(layer.M.requires_grad for layer in method.memory_heads().values()):
        raise UserError("only_touched_units=true needs a Memory Head that is trained, e.g. model.init_args.head")
    optimizer = memory_head_optimizer(method, make, params=params)
    if method.trainer.gradient_clip_val is not None:
        for layer in method.memory_heads().values():
            layer.sparse_gradients = False  # torch clips no values of sparse tensors, and lately only norms
    return optimizer


def may_skip_steps(method: Trained) -> bool:
    """Whether gradients that are not finite may keep the trainer from a step: a precision that scales the loss does,
    and a method's own way of clipping may, with ``error_if_nonfinite``.
    """
    scaled = getattr(method.trainer.precision_plugin, "scaler", None) is not None
    return scaled or is_overridden("configure_gradient_clipping", method)


def gradients_are_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients that an optimizer steps by are."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = (
        one.grad.coalesce().values() if one.grad.is_sparse else one.grad for one in parameters if one.grad is not None
    )
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def make_lr_scheduler(make: LRSchedulerCallable, optimizer: Optimizer) -> LRSchedulerTypeUnion:
    """The scheduler of an optimizer, which scales the learning rates of its groups as they are.

    Args:
        make: makes it from the optimizer.
        optimizer: whose groups have their learning rates.

    Raises:
        UserError: if it starts all groups at a learning rate of its own, as OneCycleLR and CyclicLR do.
    """
    given = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = make(optimizer)
    start = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if any(not math.isclose(one * given[0], wanted * start[0]) for one, wanted in zip(start, given, strict=True)):
        raise UserError(
            f"{type(scheduler).__name__} sets all learning rates itself, so the backbone would lose "
            "backbone.learning_rate_factor or layer_decay; leave these out, or take another scheduler."
        )
    return scheduler


def settings_to_resume_with(
    method: Trained, optimizer: Optimizer, scheduler: LRSchedulerTypeUnion | None
) -> dict[str, str]:
    """What a run must have in common with the checkpoint that it resumes, by the names of options."""
    settings = {name: str(value) for name, value in optimizer.defaults.items()}
    settings |= {f"backbone.{name}": str(value) for name, value in method.backbone.optimizer_settings().items()}
    if method.only_touched_units:
        settings["only_touched_units"] = "True"
    if scheduler is not None:
        state = scheduler.state_dict()
        settings |= {f"lr_scheduler.{name}": str(value) for name, value in state.items() if not name.startswith("_")}
    return settings


def for_trainer(optimizer: Optimizer, scheduler: LRSchedulerTypeUnion | None) -> OptimizerLRScheduler:
    """The same as Lightning takes it."""
    if scheduler is None:
        return optimizer
    if isinstance(scheduler, ReduceLROnPlateau):
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", "train/loss")},
        }
    return {"optimizer": optimizer, "lr_scheduler": scheduler}
