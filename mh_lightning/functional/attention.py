"""Matching samples with keys, and weighing the units that match best."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(NamedTuple):
    """What a batch attends to: the k best units of each key set, best first."""

    responses: Tensor  # (b, q, k)
    units: Tensor  # (b, q, k), integer indices of memory units
    alphas: Tensor  # (b, q, k), non-negative, sums to 1 over k


def match(z: Tensor, keys: Tensor, distance: str = "cosine", sigma_eu: float = 1.0) -> Tensor:
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
    # distances do not feel a common shift, but the expanded square loses digits to it
    centre = keys.detach().mean(dim=(0, 1))
    z, keys = z - centre, (keys - centre).reshape(q * m, d)
    squared = torch.addmm(keys.square().sum(1), z, keys.t(), alpha=-2) + z.square().sum(1, keepdim=True)
    return torch.exp(squared.clamp_min(0) / (-math.sqrt(d) * sigma_eu)).view(-1, q, m)


def attend(responses: Tensor, delta: int, gamma_alpha: float) -> Attention:
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
