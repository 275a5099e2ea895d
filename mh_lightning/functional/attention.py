"""Matching samples with keys, and weighing the units that match best."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mh_lightning.functional.distances import squared_distances

EPSILON = 1e-12  # the shortest length that is divided by, as in torch.nn.functional.normalize


class Attention(NamedTuple):
    """What a batch attends to: the k best units of each key set, best first."""

    responses: Tensor  # (b, q, k)
    units: Tensor  # (b, q, k), integer indices of memory units
    alphas: Tensor  # (b, q, k), non-negative, sums to 1 over k


def match(z: Tensor, keys: Tensor, distance: str = "cosine", sigma_eu: float | Tensor = 1.0) -> Tensor:
    r"""Response of every memory unit to every sample.

    Cosine (both sides L2-normalised by the caller) and dot_scaled: :math:`r_j = z \cdot K_j / \sqrt d`;
    euclidean: :math:`r_j = \exp(-\|z - K_j\|^2 / (\sqrt d\,\sigma))`.

    Args:
        z: samples in key space, (b, d).
        keys: (q, m, d).
        distance: "cosine", "dot_scaled" or "euclidean".
        sigma_eu: width of the euclidean response, in units of squared distance over sqrt(d).

    Returns:
        Responses, (b, q, m).

    Example:
        >>> match(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), "euclidean")
        tensor([[[1.0000, 0.2431]]])
    """
    q, m, d = keys.shape
    if distance != "euclidean":
        return F.linear(z, keys.reshape(q * m, d)).view(-1, q, m) / math.sqrt(d)
    squared: Tensor = _SquaredDistances.apply(z, keys.reshape(q * m, d), m)
    return torch.exp(squared.clamp_min(0) / (-math.sqrt(d) * sigma_eu)).view(-1, q, m)


class _SquaredDistances(torch.autograd.Function):
    """Squared distances (b, q * m) of samples (b, d) and keys (q * m, d) in sets of m. Its backward makes one tensor of
    each argument's size.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, keys: Tensor, units: int) -> Tensor:
        squared, enough = squared_distances(z, keys, units)
        if any(ctx.needs_input_grad):
            wide = keys if enough else keys.double()
            # gradients do not feel a common shift, but lose digits to it; the samples are shifted when they are needed
            centre = wide.mean(dim=0)
            ctx.save_for_backward(z, wide - centre, centre)
        return squared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, keys, centre = ctx.saved_tensors
        z, grad = z - centre, given.to(keys.dtype)
        grad_z = grad_keys = None
        if ctx.needs_input_grad[1]:
            grad_keys = torch.addmm(keys * grad.sum(0).unsqueeze(1), grad.t(), z, beta=2, alpha=-2).to(given.dtype)
        if ctx.needs_input_grad[0]:
            grad_z = z.mul_(grad.sum(1, keepdim=True)).addmm_(grad, keys, beta=2, alpha=-2).to(given.dtype)
        return grad_z, grad_keys, None


class _UnitLength(torch.autograd.Function):
    """Normalisation whose backward makes one tensor of the inputs' size, where torch's own makes several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        z: Tensor = x / norms.clamp_min(EPSILON)
        ctx.save_for_backward(z, norms)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, norms = ctx.saved_tensors
        along = torch.bmm(grad.unsqueeze(1), z.unsqueeze(2)).squeeze(2)
        along = along.masked_fill(norms <= EPSILON, 0)  # where it only scales
        return torch.addcmul(grad, along, z, value=-1).div_(norms.clamp_min(EPSILON))


def unit_length(x: Tensor) -> Tensor:
    r"""Rows of length 1, :math:`x / \max(\|x\|, 10^{-12})`, as `torch.nn.functional.normalize` gives them.

    Args:
        x: (b, d).

    Example:
        >>> unit_length(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    z: Tensor = _UnitLength.apply(x)
    return z


def attend(responses: Tensor, delta: int, gamma_alpha: float | Tensor) -> Attention:
    r"""Select the best `delta` units of each key set and weigh them: :math:`\alpha = \mathrm{softmax}(\gamma\,r)`.

    Args:
        responses: (b, q, m).
        delta: units to select, 1 <= delta <= m.
        gamma_alpha: inverse temperature of the softmax.

    Example:
        >>> attend(torch.tensor([[[0.0, 2.0, 1.0]]]), delta=2, gamma_alpha=0.0).units
        tensor([[[1, 2]]])
    """
    top, units = responses.topk(delta, dim=2)
    return Attention(top, units, torch.softmax(gamma_alpha * top, dim=2))


def spread(alphas: Tensor, units: Tensor, count: int) -> Tensor:
    """Weights (b, q, k) of selected units as a (b, q, count) tensor, zero where a unit is not selected."""
    return alphas.new_zeros(*units.shape[:2], count).scatter(2, units, alphas)
