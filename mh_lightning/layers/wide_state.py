"""State that stays in float32 or better when a module is cast to half precision."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type itself, or float32 if it is narrower.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


class WideState(nn.Module):
    """A module some of whose state moves by steps that half precision would round away.

    ``module.half()``, ``.bfloat16()``, ``.to(dtype)`` and loading a state dict of half precision leave the parameters
    and buffers named in `wide` in float32 (or in float64, where they are).

    Example:
        >>> class Mean(WideState):
        ...     wide = ("mean",)
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(3))
        >>> Mean().bfloat16().mean.dtype
        torch.float32
    """

    wide: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name).detach() for name in self.wide}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in before.items():
            state = getattr(self, name)
            if state.dtype != at_least_float32(state.dtype):
                state.data = values.to(state.device, at_least_float32(state.dtype))
                if state.grad is not None:
                    state.grad = state.grad.to(state.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.wide:
            if prefix + name in state_dict:  # which may be assigned as it is
                value = state_dict[prefix + name]
                state_dict[prefix + name] = value.to(at_least_float32(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


def require_whole(layer: nn.Module) -> None:
    """Refuse parameters of which this process holds but a shard, since they are changed outside of the optimizer."""
    for name, parameter in layer.named_parameters(recurse=False):
        if hasattr(parameter, "device_mesh") or parameter.dim() != 3:
            raise UserError(
                f"{type(layer).__name__}: {name} is spread over processes, as by FSDP; leave this layer out of what is "
                "sharded, or use DistributedDataParallel."
            )
