"""Every touch of a private name of torch; nothing here imports Lightning, which the layer does not need.

Checked with torch 2.14.1. The containers of `torch.nn.Module` that layers look into are not here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["BatchNorm"]


def is_traced(tensor: Tensor) -> bool:
    """Whether operations on `tensor` are traced, so that the way of computing must not depend on values:
    torch.compile, torch.export, torch.jit.trace, make_fx, fake tensors, and transforms of torch.func.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or type(tensor) is not Tensor
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or in_function_transform()
    )


def in_function_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_second_derivatives() -> None:
    """To be called in a backward that is not differentiable itself."""
    if torch.is_grad_enabled():
        raise RuntimeError("MHLinear has no second derivatives: create_graph=True cannot pass through it.")


def backward_at_work() -> int:
    """The number of the backward pass that this is called in, or -1."""
    return torch._C._current_graph_task_id()


def is_in_backward_of_a_node() -> bool:
    """Whether this is called while a node of a graph is back-propagated."""
    return torch._C._current_autograd_node() is not None


def users_of_storage(storage: torch.UntypedStorage) -> int:
    """How many hold a storage: tensors, and the object that is given."""
    return torch._C._storage_Use_Count(storage._cdata)


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether anything is called before or after an optimizer's steps."""
    return any((
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    ))  # fmt: skip


def hooks_of_all_modules() -> list[Any]:
    """What torch calls before and after each forward of any module."""
    return [_global_forward_pre_hooks, _global_forward_hooks]


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called on it; copies are made without."""
    return module._compiled_call_impl is not None
