"""One sample and a small memory: attention, blending and key updates in NumPy.

A stream is often learnt one sample at a time. Then each of torch's calls costs more than its work, and NumPy's cost a
fraction: this is what makes an online step fast. The definitions are those of `attention`, `blending`
and `key_updates`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.compat.torch_names import is_traced, refuse_second_derivatives
from mh_lightning.functional.attention import EPSILON
from mh_lightning.functional.key_updates import longest

LARGEST_SQUARE = {dtype.itemsize: longest(dtype) ** 2 for dtype in (torch.float32, torch.float64)}  # of a length
MOST_NUMBERS = 4096  # keys or memories of more numbers keep torch's calls busy

Integers = NDArray[np.int64]
Floats = NDArray[np.float32] | NDArray[np.float64]


class OneAttention(NamedTuple):
    """What one sample attends to: the k best units, best first."""

    responses: Floats  # (k,)
    units: Integers  # (k,)
    alphas: Floats  # (k,)


def is_one_sample(sample: Tensor, memories: Tensor) -> bool:
    """Whether this module serves: one sample (1, n) and a small memory of one set (1, m, u), on the CPU."""
    return (
        sample.dim() == 2
        and sample.shape[0] == 1
        and memories.shape[0] == 1
        and memories.numel() <= MOST_NUMBERS
        and memories.dtype == sample.dtype
        and sample.dtype in (torch.float32, torch.float64)
        and sample.device.type == "cpu"
        and not is_traced(sample)
    )


def attend_one(z: Floats, keys: Floats, distance: str, sigma_eu: float, delta: int, gamma_alpha: float) -> OneAttention:
    """`attend` of `match`, for one sample.

    Args:
        z: (d,); with cosine, of any length.
        keys: (m, d).
        distance: as in `match`.
        sigma_eu: as in `match`.
        delta: as in `attend`.
        gamma_alpha: as in `attend`.

    Example:
        >>> int(attend_one(np.array([0.0, 1.0]), np.eye(2), "euclidean", 1.0, 1, 1.0).units[0])
        1
    """
    root = math.sqrt(len(z))
    if distance == "euclidean":
        difference = keys - z
        responses = np.exp(np.einsum("md,md->m", difference, difference) / keys.dtype.type(-root * sigma_eu))
    else:
        responses = keys @ z / keys.dtype.type(root)
    units = (-responses).argsort(kind="stable")[:delta]
    top = responses[units]
    weights = np.exp(gamma_alpha * (top - top[0]))
    return OneAttention(top, units, weights / weights.sum())


def blend_one(inputs: Tensor, memories: Tensor, attention: OneAttention, bias: bool, winner_only: bool) -> Tensor:
    """`blend` for one sample.

    Args:
        inputs: (1, n).
        memories: (1, m, u).
        attention: from `attend_one`.
        bias: as in `blend`.
        winner_only: as in `blend`.

    Returns:
        (1, p).

    Example:
        >>> equal = OneAttention(np.zeros(2), np.array([0, 1]), np.array([0.5, 0.5], np.float32))
        >>> blend_one(torch.tensor([[10.0]]), torch.tensor([[[1.0], [3.0]]]), equal, bias=False, winner_only=True)
        tensor([[20.]])
    """
    blended: Tensor = _BlendOne.apply(inputs, memories, attention, bias, winner_only)
    return blended


class _BlendOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, memories: Tensor, attention: OneAttention, bias: bool, winner_only: bool
    ) -> Tensor:
        x, (_, units, alphas) = inputs.numpy()[0], attention
        matrix = (alphas @ memories.numpy()[0, units]).reshape(-1, len(x) + bias)
        y = matrix[:, :-1] @ x + matrix[:, -1] if bias else matrix @ x
        ctx.save_for_backward(inputs)
        ctx.matrix, ctx.memory_shape = matrix, memories.shape
        learning = 1 if winner_only else len(units)
        ctx.units, ctx.alphas = units[:learning], alphas[:learning]
        return torch.from_numpy(y[None])  # no view of a tensor, so that it can be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        (inputs,) = ctx.saved_tensors
        x, g = inputs.numpy()[0], grad.numpy()[0]
        grad_inputs = grad_memories = None
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.from_numpy(g @ ctx.matrix[:, : len(x)]).unsqueeze(0)
        if ctx.needs_input_grad[1]:
            gradient = np.zeros((ctx.memory_shape[1], *ctx.matrix.shape), x.dtype)
            rows = np.multiply.outer(ctx.alphas, g)[:, :, None]
            gradient[ctx.units, :, : len(x)] = rows * x
            gradient[ctx.units, :, len(x) :] = rows
            grad_memories = torch.from_numpy(gradient).view(ctx.memory_shape)
        return grad_inputs, grad_memories, None, None, None


def is_finite(numbers: Floats) -> bool:
    """Whether all of some numbers (1, o) are finite.

    Example:
        >>> is_finite(np.array([[0.0, np.nan]])), is_finite(np.array([[1e9, -1e9]]))
        (False, True)
    """
    return math.isfinite(numbers[0] @ numbers[0]) or bool(np.isfinite(numbers).all())


def is_usable(z: Floats, response: float) -> bool:
    """`usable_rows` for one sample (d,).

    Example:
        >>> is_usable(np.array([1.0, np.inf]), 0.5), is_usable(np.ones(2), 0.5)
        (False, True)
    """
    return float(z @ z) < LARGEST_SQUARE[z.dtype.itemsize] and math.isfinite(response)


def unit_to_scramble(
    response: float, mu: Integers, eta: Integers, *, tau_alpha: float, tau_mu: int, tau_eta: int
) -> int | None:
    """`plan_scramble` for one sample: the unit to recycle, if any.

    Args:
        response: of the winner.
        mu: usage, (m,).
        eta: age, (m,).
        tau_alpha: as in `plan_scramble`.
        tau_mu: as in `plan_scramble`.
        tau_eta: as in `plan_scramble`.

    Example:
        >>> unit_to_scramble(0.1, np.array([5, 5, 0]), np.array([0, 0, 9]), tau_alpha=0.5, tau_mu=1,
        ...                  tau_eta=9)
        2
    """
    if not response < tau_alpha:
        return None
    ages = np.where(mu < tau_mu, eta, np.iinfo(np.int64).min)
    oldest = int(ages.argmax())
    return oldest if ages[oldest] >= tau_eta else None


def move_key_(key: Floats, z: Floats, response: float, *, distance: str, beta_k: float, sigma_eu: float) -> None:
    """`move_keys_` for one sample and the key (d,) that won it, in place."""
    if distance == "euclidean":
        key += key.dtype.type(response * beta_k / (math.sqrt(len(z)) * sigma_eu)) * (z - key)
        return
    key += key.dtype.type(beta_k if distance == "cosine" else beta_k / math.sqrt(len(z))) * z
    if distance == "cosine":
        key /= max(math.sqrt(float(key @ key)), EPSILON)
