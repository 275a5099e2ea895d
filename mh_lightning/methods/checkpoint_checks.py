"""Whether a checkpoint fits a method and its configuration, said before training starts."""

from collections import deque
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from mh_lightning.errors import UserError


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


def check_state(
    checkpoint: dict[str, Any],
    architecture: str,
    num_classes: int,
    state: dict[str, Tensor],
    option: str = "ckpt_path",
) -> None:
    """Compare a checkpoint's architecture, number of classes and shapes with the model's.

    Raises:
        UserError: if the checkpoint belongs to another configuration.
    """
    saved = checkpoint.get("architecture")
    if saved != architecture:
        raise UserError(
            f"{option}: the checkpoint holds {saved or 'no model of mh_lightning'}, but the "
            f"configuration describes {architecture}; use the configuration it was trained with."
        )
    if checkpoint.get("num_classes") != num_classes:
        raise UserError(
            f"{option}: the checkpoint's model tells {checkpoint.get('num_classes')} classes apart, and the data have "
            f"{num_classes}; give the data that it was trained on."
        )
    weights = checkpoint["state_dict"]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{option}: the checkpoint's state_dict must hold tensors by name; it is damaged.")
    for name in sorted(weights.keys() | state.keys()):
        if name not in weights or name not in state or _kind(weights[name]) != _kind(state[name]):
            shapes = [_kind(one[name]) if name in one else "nothing" for one in (weights, state)]
            raise UserError(
                f"{option}: the checkpoint holds {shapes[0]} for {name!r}, but the configuration needs "
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


def tell_of_state_that_is_lost(method: nn.Module, born: Collection[str]) -> None:
    """Warn of what a method keeps and no checkpoint will bring back.

    Args:
        method: whose attributes are looked at.
        born: modules that it has made since the start and does not make for a checkpoint.
    """
    name = type(method).__name__
    for module in born:
        rank_zero_warn(
            f"model: {name} has made the module {module!r} since the fit began; no checkpoint of it can be loaded "
            f"before {name}.make_module({module!r}) returns one to fill."
        )
    for attribute, value in vars(method).items():
        if not attribute.startswith("_") and _holds_tensors(value):
            rank_zero_warn(
                f"model: {name} keeps tensors in self.{attribute}, which no checkpoint holds, so that a resumed run "
                "would be another one; use register_buffer, or on_save_checkpoint and on_load_checkpoint."
            )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | deque):
        return any(_holds_tensors(one) for one in value)
    return isinstance(value, Tensor)
