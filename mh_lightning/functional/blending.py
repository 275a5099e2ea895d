"""Blending memory units: of their outputs for matrices, of the units themselves for vectors."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.compat.torch_names import is_traced, refuse_second_derivatives
from mh_lightning.functional.attention import Attention, spread
from mh_lightning.functional.autocast import without_autocast
from mh_lightning.functional.gradient_memory import GradientMemory, memory_of
from mh_lightning.functional.grouped import (
    gaps,
    group_by_unit,
    grouped_outer_products,
    grouped_products,
    grouped_sums,
    grouping_pays,
)


def blend(
    inputs: Tensor,
    memories: Tensor,
    attention: Attention,
    *,
    bias: bool = False,
    winner_only: bool = False,
    sparse: bool = False,
) -> Tensor:
    r"""Apply each sample's blended unit to it: :math:`y = \sum_j \alpha_j (W_j x + c_j)`.

    The outputs of the units are mixed, never their weights, so no tensor holds a weight matrix for each sample. Every
    product multiplies either all samples with all units, or each unit with the samples that selected it, whichever
    costs less.

    Args:
        inputs: (b, n), or (b, q, n) with an input of its own for each key set. Memories are cast to their type.
        memories: (q, m, u), units of p rows: n weights and, with `bias`, a bias.
        attention: from `attend`.
        bias: whether the rows end with a bias.
        winner_only: only the best unit of a sample receives a gradient; the other memories are constants.
        sparse: where the memories' gradient is computed unit by unit, it is a sparse tensor of the units that have one.

    Returns:
        (b, q * p).

    Example:
        >>> units = torch.tensor([[[1.0], [3.0]]])  # one key set, two units, one weight each
        >>> equal = Attention(torch.zeros(1, 1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]))
        >>> blend(torch.tensor([[10.0]]), units, equal)
        tensor([[20.]])
    """
    blended: Tensor = _Blend.apply(inputs, memories, attention.alphas, attention.units, bias, winner_only, sparse)
    return blended


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        memories: Tensor,
        alphas: Tensor,
        units: Tensor,
        bias: bool,
        winner_only: bool,
        sparse: bool,
    ) -> Tensor:
        outputs = _selected_outputs(inputs, memories.view(_sizes(memories.shape, inputs, bias)), bias, units)
        of_inputs, _, of_alphas, *_ = ctx.needs_input_grad
        # where only the shape of the memories is needed, they may change before the backward pass
        ctx.save_for_backward(inputs, memories if of_inputs else None, alphas, units, outputs if of_alphas else None)
        ctx.shape, ctx.dtype, ctx.memory = memories.shape, memories.dtype, memory_of(memories)
        ctx.bias, ctx.winner_only, ctx.sparse = bias, winner_only, sparse
        weighted = alphas.to(outputs.dtype).unsqueeze(3) * outputs
        # no view is returned, so that it can be changed in place, like any layer's output
        return weighted.sum(dim=(1, 2)) if units.shape[1] == 1 else weighted.sum(dim=2).flatten(1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        inputs, memories, alphas, units, outputs = ctx.saved_tensors
        sizes = _sizes(ctx.shape, inputs, ctx.bias)
        grad = grad.reshape(len(grad), sizes[0], sizes[2])
        grad_inputs = grad_memories = grad_alphas = None
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                weights = memories.view(sizes)[..., : inputs.shape[-1]]
                grad_inputs = _grad_of_inputs(grad, inputs, weights, alphas, units)
            if ctx.needs_input_grad[1]:
                learning = slice(0, 1 if ctx.winner_only else None)
                grad_memories = _grad_of_memories(
                    grad, inputs, sizes, ctx.dtype, alphas[..., learning], units[..., learning], ctx.sparse, ctx.memory
                )
            if ctx.needs_input_grad[2]:
                grad_alphas = torch.matmul(outputs, grad.unsqueeze(3)).squeeze(3).to(alphas.dtype)
        return grad_inputs, grad_memories, grad_alphas, None, None, None, None


Sizes = tuple[int, ...]


def _sizes(shape: torch.Size, inputs: Tensor, bias: bool) -> Sizes:
    """Of memories of this shape, as matrices (q, m, p, n + bias)."""
    q, m, u = shape
    width = inputs.shape[-1] + bias
    return q, m, u // width, width


def _grouped(inputs: Tensor, sizes: Sizes, units: Tensor) -> bool:
    q, m, p, n = sizes
    # groups depend on the data, and a traced graph must not
    if q > 1 or is_traced(units):
        return False
    return grouping_pays(inputs.shape[0], units.numel(), m, p * n, inputs.device.type)


def _selected_outputs(inputs: Tensor, rows: Tensor, bias: bool, units: Tensor) -> Tensor:
    """Each selected unit's output, (b, q, k, p)."""
    b, q, k = units.shape
    _, m, p, _ = rows.shape
    n = inputs.shape[-1]
    if _grouped(inputs, rows.shape, units):
        groups = group_by_unit(units[:, 0], m, p * n)
        return grouped_products(inputs, rows[0, ..., :n], rows[0, ..., n] if bias else None, groups).view(b, q, k, p)
    rows = rows.to(inputs.dtype)
    if inputs.dim() == 2:
        flat = rows.reshape(q * m * p, n + bias)
        outputs = F.linear(inputs, flat[:, :n], flat[:, n] if bias else None).view(b, q, m, p)
    else:
        outputs = torch.einsum("bqn,qmpn->bqmp", inputs, rows[..., :n])
        outputs = outputs + rows[..., n] if bias else outputs
    return outputs.gather(2, units.unsqueeze(3).expand(b, q, k, p))


def _grad_of_inputs(grad: Tensor, inputs: Tensor, weights: Tensor, alphas: Tensor, units: Tensor) -> Tensor:
    q, m, p, n = weights.shape
    if _grouped(inputs, weights.shape, units):
        groups = group_by_unit(units[:, 0], m, p * n)
        return grouped_sums(_pair_grads(grad, alphas), weights[0], groups, len(inputs))
    unit_grads = _unit_grads(grad, alphas, units, m)
    weights = weights.to(grad.dtype)
    if inputs.dim() == 2:
        return torch.mm(unit_grads.flatten(1), weights.reshape(q * m * p, n))
    return torch.einsum("bqmp,qmpn->bqn", unit_grads, weights)


def _grad_of_memories(
    grad: Tensor,
    inputs: Tensor,
    sizes: Sizes,
    dtype: torch.dtype,
    alphas: Tensor,
    units: Tensor,
    sparse: bool,
    memory: GradientMemory | None,
) -> Tensor:
    q, m, p, width = sizes
    n = inputs.shape[-1]
    bias, shape = width > n, (q, m, p * width)
    if not _grouped(inputs, sizes, units):
        unit_grads = _unit_grads(grad, alphas, units, m)
        if inputs.dim() == 2 and not torch.compiler.is_compiling():
            other_type = inputs.dtype != dtype  # which is cast below
            gradient = inputs.new_empty(sizes) if memory is None or other_type else memory.empty(inputs, sizes)
            torch.mm(unit_grads.flatten(1).t(), inputs, out=gradient.view(q * m * p, width)[:, :n])
            if bias:
                torch.sum(unit_grads, dim=0, out=gradient[..., n])
        else:
            gradient = torch.einsum("bqmp,bn->qmpn" if inputs.dim() == 2 else "bqmp,bqn->qmpn", unit_grads, inputs)
            if bias:
                gradient = torch.cat([gradient, unit_grads.sum(dim=0).unsqueeze(3)], dim=3)
        return gradient.view(shape).to(dtype)
    groups = group_by_unit(units[:, 0], m, p * n, only_touched=sparse)
    size = (len(groups.units), p * width)
    if sparse:
        values = inputs.new_empty(size, dtype=dtype)
    elif memory is None:
        values = inputs.new_zeros(size, dtype=dtype)
    else:
        values = memory.empty(inputs.new_empty(0, dtype=dtype), size)
        for left_out in gaps(groups):
            values[left_out] = 0
    grouped_outer_products(_pair_grads(grad, alphas), inputs, groups, out=values.view(-1, p, width))
    if not sparse:
        return values.unsqueeze(0)
    places = torch.stack([torch.zeros_like(groups.units), groups.units])
    return torch.sparse_coo_tensor(places, values, shape, is_coalesced=True, check_invariants=False)


def _unit_grads(grad: Tensor, alphas: Tensor, units: Tensor, count: int) -> Tensor:
    """Gradient of every unit's output, (b, q, m, p)."""
    return spread(alphas.to(grad.dtype), units, count).unsqueeze(3) * grad.unsqueeze(2)


def _pair_grads(grad: Tensor, alphas: Tensor) -> Tensor:
    """Gradient of each pair's output, (pairs + 1, p), and a zero for no pair."""
    return F.pad((alphas.to(grad.dtype).unsqueeze(3) * grad.unsqueeze(2)).flatten(0, 2), (0, 0, 0, 1))


def blend_vectors(vectors: Tensor, attention: Attention, winner_only: bool = False) -> Tensor:
    r"""Blend vectors of the units for each sample: :math:`\sum_j \alpha_j v_j`.

    Args:
        vectors: (q, m, n).
        attention: from `attend`.
        winner_only: as in `blend`.

    Returns:
        (b, q, n).

    Example:
        >>> equal = Attention(torch.zeros(1, 1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]))
        >>> blend_vectors(torch.tensor([[[1.0], [3.0]]]), equal)
        tensor([[[2.]]])
    """
    mixing = spread(attention.alphas, attention.units, vectors.shape[1]).to(vectors.dtype)
    if not winner_only:
        return torch.einsum("bqm,qmn->bqn", mixing, vectors)
    winners = torch.zeros_like(mixing).scatter(2, attention.units[..., :1], 1.0) * mixing
    constant = torch.einsum("bqm,qmn->bqn", mixing - winners, vectors.detach())
    return constant + torch.einsum("bqm,qmn->bqn", winners, vectors)
