"""How keys organise themselves: recycling weak units, and online k-means."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

YOUNGEST = torch.iinfo(torch.long).min


def usable_rows(z: Tensor, winner_responses: Tensor) -> Tensor:
    """The samples (b,) that keys may learn from: those whose numbers, and their squares, are finite.

    Args:
        z: (b, d).
        winner_responses: (b, q), NaN for a sample that is to be left out.

    Example:
        >>> usable_rows(torch.tensor([[1.0], [torch.nan], [torch.inf], [1e30]]), torch.zeros(4, 1))
        tensor([ True, False, False, False])
    """
    short: Tensor = torch.linalg.vector_norm(z, dim=1) < longest(z.dtype)
    return short & winner_responses.isfinite().all(dim=1)


def are_usable(z: Tensor, winner_responses: Tensor) -> bool:
    """Whether all rows are usable, as far as two numbers tell: no for some batches of which they are."""
    return float(torch.linalg.vector_norm(z)) < longest(z.dtype) and math.isfinite(float(winner_responses.sum()))


def longest(dtype: torch.dtype) -> float:
    """The length of z from which on squared distances overflow."""
    return math.sqrt(torch.finfo(dtype).max) / 8


class ScramblePlan(NamedTuple):
    """The unit that each key set would recycle, for which sample, and whether it does."""

    wanted: Tensor  # (q,)
    units: Tensor  # (q,)
    samples: Tensor  # (q,)


def plan_scramble(
    winner_responses: Tensor,
    mu: Tensor,
    eta: Tensor,
    *,
    tau_alpha: float,
    tau_mu: int,
    tau_eta: int,
) -> ScramblePlan:
    r"""Decide which unit, if any, each key set recycles for the sample that it knows least.

    The weakest sample is :math:`s = \arg\min_i r_i` over the winners' responses. A unit is weak when
    :math:`\mu < \tau_\mu` and :math:`\eta \ge \tau_\eta`; the oldest weak one (first on ties) is recycled if
    :math:`r_s < \tau_\alpha`.

    Args:
        winner_responses: (b, q), of the forward.
        mu: usage, (q, m), in samples won.
        eta: age, (q, m), in samples since the unit last won.
        tau_alpha: response below which a sample counts as unknown.
        tau_mu: usage below which a unit may be recycled.
        tau_eta: age from which a unit may be recycled.

    Example:
        >>> plan_scramble(torch.tensor([[0.9], [0.1]]), torch.tensor([[5, 5, 0]]), torch.tensor([[0, 0, 9]]),
        ...               tau_alpha=0.5, tau_mu=1, tau_eta=9)
        ScramblePlan(wanted=tensor([True]), units=tensor([2]), samples=tensor([1]))
    """
    weakest, sample = winner_responses.min(dim=0)
    # a unit that is used too much counts as younger than any
    oldest, unit = torch.where(mu < tau_mu, eta, YOUNGEST).max(dim=1)
    return ScramblePlan((weakest < tau_alpha) & (oldest >= tau_eta), unit, sample)


def move_keys_(
    keys: Tensor,
    z: Tensor,
    winners: Tensor,
    winner_responses: Tensor,
    *,
    distance: str,
    beta_k: float,
    sigma_eu: float = 1.0,
) -> Tensor:
    r"""Let each sample pull its winner towards itself (online k-means), in place.

    Cosine :math:`K_w \leftarrow K_w + \beta z`, then normalised; dot_scaled :math:`K_w + \frac{\beta}{\sqrt d} z`;
    euclidean :math:`K_w + \frac{\beta}{\sqrt d\,\sigma} r\,(z - K_w)`. Contributions to one key add up.

    Args:
        keys: (q, m, d), after scrambling. With cosine, all rows are normalised, or only the winner's when b = 1.
        z: (b, d).
        winners: (b, q), of the forward.
        winner_responses: (b, q), of the forward.
        distance: as in `match`.
        beta_k: step size.
        sigma_eu: as in `match`.

    Returns:
        The keys.

    Example:
        >>> move_keys_(torch.zeros(1, 1, 4), torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.long),
        ...            torch.ones(1, 1), distance="euclidean", beta_k=1.0)
        tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])
    """
    q, m, d = keys.shape
    if distance == "euclidean":
        steps = winner_responses * (beta_k / (math.sqrt(d) * sigma_eu))
        pulls = steps.new_zeros(*steps.shape, m).scatter_(2, winners.unsqueeze(2), steps.unsqueeze(2)).flatten(1)
        keys *= (1 - pulls.sum(dim=0)).view(q, m, 1)
        keys.view(q * m, d).addmm_(pulls.t(), z)
        return keys
    _add_in_order(keys, winners, z, beta_k if distance == "cosine" else beta_k / math.sqrt(d))
    if distance == "cosine" and len(z) > 1:
        _normalise_(keys)
    elif distance == "cosine":
        sets = torch.arange(q, device=keys.device)
        keys[sets, winners[0]] = _normalise_(keys[sets, winners[0]])
    return keys


def _add_in_order(keys: Tensor, winners: Tensor, z: Tensor, step: float) -> None:
    """Sample after sample, as published: duplicate keys tie, and rounding decides which of them wins."""
    pulls = step * z
    if keys.is_cuda:  # where index_add_ keeps no order, so that ranks would drift apart
        sets = torch.arange(len(keys), device=keys.device).unsqueeze(1)
        keys.index_put_((sets, winners.t()), pulls.expand(len(keys), *z.shape), accumulate=True)
    else:
        for key_set, won_by in zip(keys, winners.t(), strict=True):
            key_set.index_add_(0, won_by, pulls)


def _normalise_(rows: Tensor) -> Tensor:
    """`torch.nn.functional.normalize` of the last dimension, in place."""
    return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12))
