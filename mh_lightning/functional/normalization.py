"""What features are divided by before closed-form heads see them."""

import torch
from torch import Tensor

from mh_lightning.functional.attention import EPSILON

NORMALIZATIONS = ("none", "l2", "sqrt")
SMALLEST_ROOTED = 1e-36  # roots of 0, of which features have many, have no gradient, and are slow on some processors


def rooted_and_length(x: Tensor, normalization: str) -> tuple[Tensor, Tensor | None]:
    """Features, and what they are still to be divided by, so that a product with them can be divided instead.

    Args:
        x: features, (b, n).
        normalization: "none": x as it is; "l2": x / ||x||; "sqrt": the same of sign(x) sqrt(|x|).

    Returns:
        (b, n), and lengths (b, 1), or None with "none".

    Example:
        >>> rooted_and_length(torch.tensor([[9.0, -16.0]]), "sqrt")
        (tensor([[ 3., -4.]]), tensor([[5.]]))
    """
    if normalization == "none":
        return x, None
    if normalization == "sqrt":
        x = x.sign() * x.abs().clamp_min(SMALLEST_ROOTED).sqrt()
        return x, torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPSILON)
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # squares may leave float32
    return x, largest * torch.linalg.vector_norm(x / largest, dim=1, keepdim=True).clamp_min(1.0)


def normalised(x: Tensor, normalization: str) -> Tensor:
    """Features (b, n) divided by their length, or as they are; see `rooted_and_length`.

    Example:
        >>> normalised(torch.tensor([[3.0, 4.0]]), "l2")
        tensor([[0.6000, 0.8000]])
    """
    x, lengths = rooted_and_length(x, normalization)
    return x if lengths is None else x / lengths
