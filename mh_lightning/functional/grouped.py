"""Matrix products of samples with the units that they select: samples are grouped by unit, and each unit multiplies
its own group only.

Groups differ in size, and a batched product wants equal ones. So neighbouring units share a batched product, with their
groups padded to the largest among them, as long as the padded rows stay few; a popular unit is left alone.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# What a step costs beside its multiplications, in multiply-adds (measured on a CPU: docs/performance_details.md).
READ_WEIGHT = 16  # fetching a weight from memory
GROUPING = {"cpu": 10_000_000, "cuda": 4_000_000_000}  # sorting samples and starting products; cuda: an estimate
LARGE_PRODUCT = 20_000_000  # from here on, a product of its own is as fast as a share of a batched one


class Block(NamedTuple):
    """Neighbouring units whose groups are multiplied at once."""

    units: slice
    places: slice
    size: int  # places of each unit


class Groups(NamedTuple):
    """Pairs of a sample and a unit, grouped by unit and laid out in blocks, padded with places of no pair."""

    blocks: list[Block]
    pairs: Tensor  # (places,) the pair in each place, or the number of pairs for no pair
    samples: Tensor  # (places,) its sample, any for no pair
    places: Tensor  # (pairs,) the place of each pair
    units: Tensor  # (units,) the units that the blocks count


def grouping_pays(samples: int, pairs: int, units: int, unit_size: int, device: str) -> bool:
    """Whether grouped products cost less than multiplying every sample with every unit."""
    dense = units * unit_size * (samples + READ_WEIGHT)
    grouped = unit_size * (2 * pairs + READ_WEIGHT * min(units, pairs)) + GROUPING.get(device, GROUPING["cuda"])
    return pairs > 0 and grouped < dense


def group_by_unit(units: Tensor, count: int, unit_size: int, only_touched: bool = False) -> Groups:
    """Group pairs by their unit.

    Args:
        units: (b, k), the units of each sample; pair i belongs to sample i // k.
        count: number of units.
        unit_size: weights of a unit.
        only_touched: leave units without a pair out, and count the others anew.

    Example:
        >>> groups = group_by_unit(torch.tensor([[2], [0], [2], [2]]), count=3, unit_size=10_000_000)
        >>> [groups.samples[block.places].tolist() for block in groups.blocks]
        [[1], [0, 2, 3]]
    """
    b, k = units.shape
    unit_of_pair = units.flatten().cpu().numpy()
    sizes = np.bincount(unit_of_pair, minlength=count)
    numbers = np.flatnonzero(sizes) if only_touched else np.arange(count)
    if only_touched:
        sizes, unit_of_pair = sizes[numbers], numbers.searchsorted(unit_of_pair)
    blocks, offsets = _lay_out(sizes.tolist(), min(b, LARGE_PRODUCT // unit_size))
    order = unit_of_pair.argsort(kind="stable")
    # a pair's place is its rank among its unit's pairs, counted from where its unit's places start
    shift = np.array(offsets) - (sizes.cumsum() - sizes)
    number = np.arange(b * k)
    places = np.empty_like(number)
    places[order] = number + shift[unit_of_pair[order]]
    pairs = np.full(blocks[-1].places.stop, b * k)
    pairs[places] = number
    samples = np.minimum(pairs // k, b - 1)
    on_device = (torch.from_numpy(array).to(units.device) for array in (pairs, samples, places, numbers))
    return Groups(blocks, *on_device)


def gaps(groups: Groups) -> list[slice]:
    """The units that are in no block.

    Example:
        >>> gaps(group_by_unit(torch.tensor([[2], [4]]), count=6, unit_size=20_000_000))
        [slice(0, 2, None), slice(3, 4, None), slice(5, 6, None)]
    """
    ends = [0, *(block.units.stop for block in groups.blocks)]
    starts = [*(block.units.start for block in groups.blocks), len(groups.units)]
    return [slice(end, start) for end, start in zip(ends, starts, strict=True) if start > end]


def _lay_out(sizes: list[int], rows: int) -> tuple[list[Block], list[int]]:
    """Blocks of at most `rows` places or one unit, and the first place of each unit."""
    blocks: list[Block] = []
    offsets = [0] * len(sizes)
    first = last = largest = end = 0

    def close_block() -> None:
        nonlocal end
        start, end = end, end + (last + 1 - first) * largest
        offsets[first : last + 1] = range(start, end, largest)
        blocks.append(Block(slice(first, last + 1), slice(start, end), largest))

    for unit in [unit for unit, size in enumerate(sizes) if size]:
        larger = max(largest, sizes[unit])
        if largest and (unit + 1 - first) * larger > rows:
            close_block()
            largest = 0
        if largest == 0:
            first, larger = unit, sizes[unit]
        last, largest = unit, larger
    close_block()
    return blocks, offsets


def grouped_products(inputs: Tensor, weights: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Each pair's input times the weights of its unit, plus its bias.

    Args:
        inputs: (b, n).
        weights: (m, p, n), cast to the inputs' type.
        bias: (m, p), likewise.
        groups: of the pairs.

    Returns:
        (pairs, p).
    """
    outputs = inputs.new_empty(len(groups.pairs), weights.shape[1])
    for block in groups.blocks:
        x, out = _gather(inputs, groups.samples, block), outputs[block.places].view(-1, block.size, outputs.shape[1])
        unit_weights = weights[block.units].to(x.dtype).transpose(1, 2)
        if bias is None:
            torch.bmm(x, unit_weights, out=out)
        else:
            torch.baddbmm(bias[block.units].to(x.dtype).unsqueeze(1), x, unit_weights, out=out)
    return outputs.index_select(0, groups.places)


def grouped_sums(grads: Tensor, weights: Tensor, groups: Groups, count: int) -> Tensor:
    """For each sample, the sum over its pairs of gradient times weights: the inputs' gradient.

    Args:
        grads: (pairs + 1, p), the last one zero.
        weights: (m, p, n), cast to the gradients' type.
        groups: of the pairs.
        count: b.

    Returns:
        (b, n).
    """
    sums = grads.new_zeros(count, weights.shape[2])
    for block in groups.blocks:
        g = _gather(grads, groups.pairs, block)
        products = torch.bmm(g, weights[block.units].to(g.dtype)).flatten(0, 1)
        sums.index_add_(0, groups.samples[block.places], products)
    return sums


def grouped_outer_products(grads: Tensor, inputs: Tensor, groups: Groups, out: Tensor) -> None:
    """For each unit, the sum over its pairs of gradient times input: the weights' gradient.

    Args:
        grads: (pairs + 1, p), the last one zero.
        inputs: (b, n).
        groups: of the pairs.
        out: (m, p, n) or, with the bias as last column, (m, p, n + 1); overwritten where a unit has a pair.
    """
    for block in groups.blocks:
        g, x = _gather(grads, groups.pairs, block).transpose(1, 2), _gather(inputs, groups.samples, block, out.shape[2])
        if x.dtype != out.dtype:
            out[block.units] = torch.bmm(g, x).to(out.dtype)
        elif len(x) == 1:  # a batch of one is slower
            torch.mm(g[0], x[0], out=out[block.units][0])
        else:
            torch.bmm(g, x, out=out[block.units])


def _gather(rows: Tensor, index: Tensor, block: Block, width: int | None = None) -> Tensor:
    """The rows that belong into a block's places, (units, places of each, ...), filled up with ones to the width."""
    chosen, columns = index[block.places], rows.shape[1]
    if width is None or width == columns:
        gathered = rows.index_select(0, chosen)
    else:
        gathered = rows.new_empty(len(chosen), width)
        torch.index_select(rows, 0, chosen, out=gathered[:, :columns])
        gathered[:, columns:] = 1
    return gathered.view(-1, block.size, gathered.shape[1])
