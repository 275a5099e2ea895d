"""Heads for more classes than they were made for, with what they have learnt."""

import copy
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from mh_lightning.errors import UserError
from mh_lightning.heads import ClosedFormHead
from mh_lightning.layers import MLP, MHLinear


@singledispatch
def grown(head: Any, num_classes: int) -> Any:
    """A head for more classes: what it was is kept, and new outputs start as those of a new head.

    Those of a `MHLinear` are new rows in every unit, those of a head in closed form new columns of its sums, as if it
    had been made for all the classes. For another kind of head, register how: ``@grown.register``.

    Args:
        head: in closed form, a linear layer, a `MHLinear`, or a perceptron that ends with one.
        num_classes: of all, as many as before at least.

    Raises:
        UserError: if it cannot grow.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> more = grown(layer, 5)
        >>> more.weight.shape, torch.equal(more.weight[:3], layer.weight)
        (torch.Size([5, 2]), True)
    """
    raise UserError(
        f"A {type(head).__name__} cannot grow to {num_classes} classes; register how with mh_lightning.growth.grown."
    )


@grown.register
def _(head: ClosedFormHead, num_classes: int) -> ClosedFormHead:
    head = copy.deepcopy(head)
    head.grow(num_classes)
    return head


@grown.register
def _(head: nn.Linear, num_classes: int) -> nn.Linear:
    _check(head.out_features, num_classes)
    own = {name for name in head.state_dict() if name not in ("weight", "bias")}
    if own or type(head).forward is not nn.Linear.forward or is_parametrized(head):
        raise UserError(
            f"A {type(head).__name__} is more than a linear layer, so how it grows is not known; register it with "
            "mh_lightning.growth.grown."
        )
    larger = copy.deepcopy(head)
    larger.out_features = num_classes
    for name, parameter in head.named_parameters():
        wider = parameter.detach().new_empty(num_classes, *parameter.shape[1:])
        setattr(larger, name, nn.Parameter(wider, parameter.requires_grad))
    larger.reset_parameters()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            parameter[: head.out_features] = getattr(head, name)
    return larger


@grown.register
def _(head: MHLinear, num_classes: int) -> MHLinear:
    _check(head.out_features, num_classes)
    larger = copy.deepcopy(head)
    if num_classes > head.out_features:
        larger.add_outputs(num_classes - head.out_features)
    return larger


@grown.register
def _(head: MLP, num_classes: int) -> MLP:
    larger = copy.deepcopy(head)
    larger[-1] = grown(head[-1], num_classes)
    return larger


def _check(now: int, num_classes: int) -> None:
    if num_classes < now:
        raise UserError(f"num_classes must be at least {now}, which the head has; got {num_classes}.")
