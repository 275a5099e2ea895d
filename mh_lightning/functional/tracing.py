"""What autograd and compilers are doing with the operations at hand."""

import torch
from torch import Tensor


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
