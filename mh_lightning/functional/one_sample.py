"""One sample and a small memory: attention, blending and key updates in NumPy.

A stream is often learnt one sample at a time. Then each of torch's calls costs more than its work, and NumPy's cost a
fraction: this is what makes an online step fast. The definitions are those of `attention`, `blending`
and `key_updates`.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.functional.attention import EPSILON, Attention
from mh_lightning.functional.recorded import recorded, refuse_second_derivatives

MOST_NUMBERS = 4096  # keys or memories of more numbers keep torch's calls busy

Integers = NDArray[np.int64]
Floats = NDArray[np.float32] | NDArray[np.float64]


def is_one_sample(sample: Tensor, memory: Tensor) -> bool:
    """Whether this module serves: one sample (1, ...) and a small memory of one set (1, m, ...), on the CPU."""
    return (
        sample.shape[0] == 1
        and memory.shape[0] == 1
        and memory.numel() <= MOST_NUMBERS
        and memory.dtype == sample.dtype
        and sample.device.type == "cpu"
        and not recorded(sample)
    )


def attend_one(z: Tensor, keys: Tensor, distance: str, sigma_eu: float, delta: int, gamma_alpha: float) -> Attention:
    """`attend` of `match`, for one sample.

    Args:
        z: (1, d).
        keys: (1, m, d).
        distance: as in `match`.
        sigma_eu: as in `match`.
        delta: as in `attend`.
        gamma_alpha: as in `attend`.

    Example:
        >>> attend_one(torch.tensor([[1.0, 0.0]]), torch.eye(2).unsqueeze(0), "euclidean", 1.0, 1, 1.0).units
        tensor([[[0]]])
    """
    responses = _responses(z.numpy()[0], keys.numpy()[0], distance, sigma_eu)
    units = (-responses).argsort(kind="stable")[:delta]
    top = responses[units]
    weights = np.exp(gamma_alpha * (top - top[0]))
    alphas = weights / weights.sum()
    return Attention(*(torch.from_numpy(part).view(1, 1, delta) for part in (top, units, alphas)))


def _responses(z: Floats, keys: Floats, distance: str, sigma_eu: float) -> Floats:
    root = math.sqrt(len(z))
    if distance != "euclidean":
        products: Floats = keys @ z / keys.dtype.type(root)
        return products
    difference = keys - z
    near: Floats = np.exp(np.einsum("md,md->m", difference, difference) / keys.dtype.type(-root * sigma_eu))
    return near


def blend_one(inputs: Tensor, memories: Tensor, attention: Attention, *, bias: bool, winner_only: bool) -> Tensor:
    """`blend` for one sample and attention without a gradient.

    Args:
        inputs: (1, n).
        memories: (1, m, u).
        attention: as in `blend`.
        bias: as in `blend`.
        winner_only: as in `blend`.

    Returns:
        (1, p).

    Example:
        >>> equal = Attention(torch.zeros(1, 1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]))
        >>> blend_one(torch.tensor([[10.0]]), torch.tensor([[[1.0], [3.0]]]), equal, bias=False, winner_only=True)
        tensor([[20.]])
    """
    learning = 1 if winner_only else attention.units.shape[2]
    blended: Tensor = _BlendOne.apply(inputs, memories, attention.alphas, attention.units, bias, learning)
    return blended


class _BlendOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, memories: Tensor, alphas: Tensor, units: Tensor, bias: bool, learning: int
    ) -> Tensor:
        x, selected, weights = inputs.numpy()[0], units.numpy()[0, 0], alphas.numpy()[0, 0]
        matrix = (weights @ memories.numpy()[0, selected]).reshape(-1, len(x) + bias)
        y = matrix @ np.append(x, x.dtype.type(1)) if bias else matrix @ x
        ctx.sample, ctx.matrix, ctx.units, ctx.alphas = x, matrix, selected[:learning], weights[:learning]
        ctx.memory_shape = memories.shape
        return torch.from_numpy(y).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, g = ctx.sample, grad.numpy()[0]
        grad_inputs = grad_memories = None
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.from_numpy(g @ ctx.matrix[:, : len(x)]).unsqueeze(0)
        if ctx.needs_input_grad[1]:
            gradient = np.zeros((ctx.memory_shape[1], *ctx.matrix.shape), x.dtype)
            rows = np.multiply.outer(ctx.alphas, g)
            gradient[ctx.units, :, : len(x)] = rows[:, :, None] * x
            gradient[ctx.units, :, len(x) :] = rows[:, :, None]
            grad_memories = torch.from_numpy(gradient).view(ctx.memory_shape)
        return grad_inputs, grad_memories, None, None, None, None


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
