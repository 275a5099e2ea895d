"""Powers of 2 that features are counted in where their squares would leave the range of float32."""

import math

import torch
from torch import Tensor

ORDINARY = 2.0**20  # features up to it, and down to its inverse, are not counted in units


def unit_of(features: Tensor) -> float:
    """What features (b, n) are counted in: 1, or the power of 2 below the largest of the first that are not all zeros,
    where that is far from 1; see `mh_lightning.heads.ClosedFormHead`.

    Example:
        >>> unit_of(torch.tensor([[3.0, 4.0]])), unit_of(torch.tensor([[0.0, 0.0], [3.0, 4e-20]]) * 1e-20) * 2**65
        (1.0, 1.0)
    """
    largest = features.abs().amax(dim=1).double()
    first = float(largest[largest > 0][:1].sum())
    if not math.isfinite(first) or first == 0 or 1 / ORDINARY <= first <= ORDINARY:
        return 1.0
    return 2.0 ** math.floor(math.log2(first))


def in_units(features: Tensor, unit: float) -> Tensor:
    """Features (b, n) divided by a power of 2, in float32 at least where that is not 1."""
    return features if unit == 1 else features.to(torch.promote_types(features.dtype, torch.float32)) / unit
