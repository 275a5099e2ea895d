"""The maths of the Memory Head as pure functions: matching, attention, blending and the updates of the keys.

Symbols, here and in `mh_lightning.layers`: b samples, n input features, q key sets, m memory units a set, d key size,
p outputs a key set (all of them with shared keys, 1 with private ones), k units selected for a sample.

Source: Tiezzi, Becattini, Marullo, Melacci, "Memory Head for Pre-Trained Backbones in Continual Learning",
CoLLAs 2024, section 3.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(NamedTuple):
    """What a batch attends to: the k best units of each key set, best first."""

    responses: Tensor  # (b, q, k)
    units: Tensor  # (b, q, k), integer indices of memory units
    alphas: Tensor  # (b, q, k), non-negative, sums to 1 over k


class ScramblePlan(NamedTuple):
    """For each key set, whether a unit is recycled, and from what."""

    active: Tensor  # (q,) bool
    unit: Tensor  # (q,) the unit that is overwritten
    sample: Tensor  # (q,) the sample that becomes its key
    source: Tensor  # (q,) the unit whose memory is copied: the winner of that sample


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
    if distance == "euclidean":
        # distances do not feel a common shift, but the expanded square loses digits to it
        centre = keys.detach().mean(dim=(0, 1))
        z, keys = z - centre, keys - centre
    products = F.linear(z, keys.reshape(q * m, d)).view(-1, q, m)
    if distance != "euclidean":
        return products / math.sqrt(d)
    squared = (z.square().sum(1).view(-1, 1, 1) + keys.square().sum(2) - 2 * products).clamp_min(0)
    return torch.exp(-squared / (math.sqrt(d) * sigma_eu))


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


class _Blend(torch.autograd.Function):
    """Outputs of all units from one matrix product, then mixed. Only the forward mixing weights reach the inputs'
    gradient; the memories' gradient uses its own, so that constants cost no second product.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, memories: Tensor, mixing: Tensor, learning: Tensor) -> Tensor:
        q, m, p, n = memories.shape
        if inputs.dim() == 2:
            unit_outputs = F.linear(inputs, memories.reshape(q * m * p, n)).view(-1, q, m, p)
        else:
            unit_outputs = torch.einsum("bqn,qmpn->bqmp", inputs, memories)
        ctx.save_for_backward(inputs, memories, mixing, learning, unit_outputs)
        return torch.einsum("bqm,bqmp->bqp", mixing, unit_outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("MHLinear has no second derivatives: create_graph=True cannot pass through it.")
        inputs, memories, mixing, learning, unit_outputs = ctx.saved_tensors
        grad_inputs = grad_memories = grad_mixing = None
        equation = ("bqmp,qmpn->bn", "bqmp,bn->qmpn") if inputs.dim() == 2 else ("bqmp,qmpn->bqn", "bqmp,bqn->qmpn")
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.einsum(equation[0], mixing.unsqueeze(3) * grad.unsqueeze(2), memories)
        if ctx.needs_input_grad[1]:
            grad_memories = torch.einsum(equation[1], learning.unsqueeze(3) * grad.unsqueeze(2), inputs)
        if ctx.needs_input_grad[2]:
            grad_mixing = torch.einsum("bqp,bqmp->bqm", grad, unit_outputs)
        return grad_inputs, grad_memories, grad_mixing, None


def blend(inputs: Tensor, memories: Tensor, attention: Attention, winner_only: bool = False) -> Tensor:
    r"""Apply each sample's blended unit to it: :math:`y = \sum_j \alpha_j M_j x`.

    The outputs of the units are mixed, never their weights, so no tensor holds a weight matrix for each sample.

    Args:
        inputs: (b, n), or (b, q, n) with an input of its own for each key set.
        memories: (q, m, p, n).
        attention: from `attend`.
        winner_only: only the best unit of a sample receives a gradient; the other memories are constants.

    Returns:
        (b, q, p).

    Example:
        >>> units = torch.tensor([[[[1.0]], [[3.0]]]])  # one key set, two units, 1 x 1 weights
        >>> equal = attend(torch.zeros(1, 1, 2), delta=2, gamma_alpha=1.0)
        >>> blend(torch.tensor([[10.0]]), units, equal)
        tensor([[[20.]]])
    """
    mixing = spread(attention, memories.shape[1]).to(inputs.dtype)
    learning = mixing.detach()
    if winner_only:
        learning = torch.zeros_like(learning).scatter(2, attention.units[..., :1], 1.0) * learning
    blended: Tensor = _Blend.apply(inputs, memories, mixing, learning)
    return blended


def blend_vectors(vectors: Tensor, attention: Attention, winner_only: bool = False) -> Tensor:
    r"""Blend vectors of the units for each sample: :math:`\sum_j \alpha_j v_j`.

    Args:
        vectors: (q, m, n).
        attention: from `attend`.
        winner_only: as in `blend`.

    Returns:
        (b, q, n).

    Example:
        >>> equal = attend(torch.zeros(1, 1, 2), delta=2, gamma_alpha=1.0)
        >>> blend_vectors(torch.tensor([[[1.0], [3.0]]]), equal)
        tensor([[[2.]]])
    """
    mixing = spread(attention, vectors.shape[1]).to(vectors.dtype)
    if not winner_only:
        return torch.einsum("bqm,qmn->bqn", mixing, vectors)
    winners = torch.zeros_like(mixing).scatter(2, attention.units[..., :1], 1.0) * mixing
    constant = torch.einsum("bqm,qmn->bqn", mixing - winners, vectors.detach())
    return constant + torch.einsum("bqm,qmn->bqn", winners, vectors)


def spread(attention: Attention, units: int) -> Tensor:
    """The attention weights as a (b, q, m) tensor, zero where a unit is not selected."""
    b, q, _ = attention.units.shape
    return attention.alphas.new_zeros(b, q, units).scatter(2, attention.units, attention.alphas)


def plan_scramble(
    winner_responses: Tensor,
    winners: Tensor,
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
        winners: (b, q), integer.
        mu: usage, (q, m), in samples won.
        eta: age, (q, m), in samples since the unit last won.
        tau_alpha: response below which a sample counts as unknown.
        tau_mu: usage below which a unit may be recycled.
        tau_eta: age from which a unit may be recycled.

    Example:
        >>> plan = plan_scramble(torch.tensor([[0.9], [0.1]]), torch.tensor([[0], [1]]), torch.tensor([[5, 5, 0]]),
        ...                      torch.tensor([[0, 0, 9]]), tau_alpha=0.5, tau_mu=1, tau_eta=9)
        >>> plan.active.item(), plan.unit.item(), plan.sample.item(), plan.source.item()
        (True, 2, 1, 1)
    """
    weakest, sample = winner_responses.min(dim=0)
    weak = (mu < tau_mu) & (eta >= tau_eta)
    unit = eta.masked_fill(~weak, -1).argmax(dim=1)
    source = winners.gather(0, sample.unsqueeze(0)).squeeze(0)
    return ScramblePlan((weakest < tau_alpha) & weak.any(dim=1), unit, sample, source)


def plan_update(
    keys: Tensor,
    z: Tensor,
    winners: Tensor,
    winner_responses: Tensor,
    *,
    distance: str,
    beta_k: float,
    sigma_eu: float = 1.0,
) -> Tensor:
    r"""Keys after each sample has pulled its winner towards itself (online k-means).

    Cosine :math:`K_w \leftarrow K_w + \beta z`, then normalised; dot_scaled :math:`K_w + \frac{\beta}{\sqrt d} z`;
    euclidean :math:`K_w + \frac{\beta}{\sqrt d\,\sigma} r\,(z - K_w)`. Contributions to one key add up.

    Args:
        keys: (q, m, d), after scrambling.
        z: (b, d).
        winners: (b, q), of the forward.
        winner_responses: (b, q), of the forward.
        distance: as in `match`.
        beta_k: step size.
        sigma_eu: as in `match`.

    Returns:
        New keys, (q, m, d). With cosine, all rows are normalised, or only the winner's when b = 1.

    Example:
        >>> plan_update(torch.zeros(1, 1, 4), torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.long),
        ...             torch.ones(1, 1), distance="euclidean", beta_k=1.0)
        tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])
    """
    sets = torch.arange(keys.shape[0], device=keys.device).unsqueeze(1)
    places = (sets, winners.t())
    if distance == "euclidean":
        steps = beta_k / (math.sqrt(z.shape[1]) * sigma_eu) * winner_responses
        pulls = steps.new_zeros(*steps.shape, keys.shape[1]).scatter(2, winners.unsqueeze(2), steps.unsqueeze(2))
        return keys + torch.einsum("bqm,bd->qmd", pulls, z) - pulls.sum(dim=0).unsqueeze(2) * keys
    # sample after sample, as published: duplicate keys tie, and rounding decides which of them wins
    step = beta_k * z if distance == "cosine" else beta_k / math.sqrt(z.shape[1]) * z
    moved = keys.index_put(places, step.expand(len(sets), *step.shape), accumulate=True)
    if distance == "dot_scaled":
        return moved
    if z.shape[0] > 1:
        return F.normalize(moved, dim=2)
    return moved.index_put(places, F.normalize(moved[places], dim=2))
