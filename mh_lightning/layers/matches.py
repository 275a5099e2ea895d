"""What a training forward of keys leaves behind for their update, and how a gradient changes it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.functional import Floats


class Forward(NamedTuple):
    """The state that a training forward was on."""

    state: list[Tensor | None]
    recycled: int | Tensor  # how often units were, see `KeyMemory`
    kept: bool  # whether its graph needs the state as it was


class Matched(NamedTuple):
    """What a training forward leaves behind for the update of the keys."""

    forward: Forward
    z: Tensor  # (b, d)
    winners: Tensor  # (b, q)
    responses: Tensor  # (b, q), of the winners; NaN for samples to be left out


class MatchedOne(NamedTuple):
    """The same for one sample and one key set."""

    forward: Forward
    z: Floats  # (d,)
    winner: int
    response: float


def as_batch(matched: Matched | MatchedOne) -> Matched:
    """One sample as a batch of one."""
    if isinstance(matched, Matched):
        return matched
    z = torch.from_numpy(matched.z).unsqueeze(0)
    return Matched(matched.forward, z, torch.tensor([[matched.winner]]), z.new_tensor([[matched.response]]))


def nan_if_not_finite(rows: Tensor, like: Tensor) -> Tensor:
    """For each of rows (b, o), or of (*, o), 0 or NaN as a column (b, 1), without a look at its values."""
    # 0 times each, since a sum of finite numbers may be infinite
    return (0 * rows).reshape(len(like), rows.shape[-1]).sum(dim=1, keepdim=True, dtype=like.dtype)


def is_not_zero(gradient: Tensor) -> Tensor | bool:
    """Whether any of its numbers is not 0, as a tensor, for which a GPU need not be waited for."""
    numbers = gradient._values() if gradient.is_sparse else gradient
    return numbers.numel() > 0 and (numbers.amax() != 0) | (numbers.amin() != 0)  # any() takes longer


class NormalisedKeys(torch.autograd.Function):
    """L2-normalised keys whose gradient is that of the normalised keys themselves, as if they had been a leaf."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor) -> Tensor:
        """Keys of length 1."""
        return F.normalize(keys, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient as it comes."""
        return grad
