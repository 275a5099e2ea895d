"""What features are divided by before closed-form heads see them."""

import torch
from torch import Tensor

from mh_lightning.functional.attention import EPSILON

NORMALIZATIONS = ("none", "l2", "sqrt")
SMALLEST_ROOTED = 1e-36  # roots of 0, of which features have many, have no gradient, and are slow on some processors


def normalised(x: Tensor, normalization: str) -> Tensor:
    """Features (b, n) divided by their length, or as they are.

    Args:
        x: features, (b, n).
        normalization: "none": x as it is; "l2": x / ||x||; "sqrt": the same of sign(x) sqrt(|x|).

    Example:
        >>> normalised(torch.tensor([[9.0, -16.0]]), "sqrt")
        tensor([[ 0.6000, -0.8000]])
    """
    if normalization == "none":
        return x
    if normalization == "sqrt":
        x = x.sign() * x.abs().clamp_min(SMALLEST_ROOTED).sqrt()
        length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / length.clamp_min(EPSILON)
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # squares may leave float32
    x = x / largest
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp_min(1.0)
