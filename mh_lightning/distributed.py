"""Collectives that are the identity without a process group. The group is looked up at each call, not before:
Lightning makes it after the layers exist.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def in_process_group() -> bool:
    """Whether there is a process group, if only of one process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if in_process_group() else 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if in_process_group() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of every rank's tensor, the same on all ranks; equal shapes are needed."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank brings, by rank: plain values and tensors, of any size."""
    values: list[Any] = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the rows of every rank, in rank order. Ranks may bring different numbers of rows, none included.

    Args:
        tensors: each (rows, ...), with the same number of rows on this rank and equal trailing shapes on all ranks.

    Returns:
        The same tensors with the rows of all ranks: two collectives, whatever the number of tensors.
    """
    ranks = world_size()
    if ranks == 1:
        return tensors
    rows = tensors[0].shape[0]
    counts = [torch.zeros(1, dtype=torch.long, device=tensors[0].device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([rows], device=tensors[0].device))
    capacity = max(int(count) for count in counts)
    if capacity == 0:
        return tensors
    # float64 carries every integer index below 2^53 exactly, so one buffer serves indices and floats alike
    sizes = [math.prod(tensor.shape[1:]) for tensor in tensors]
    packed = torch.cat([tensor.reshape(rows, size).double() for tensor, size in zip(tensors, sizes, strict=True)], 1)
    buffer = packed.new_zeros(capacity, packed.shape[1])
    buffer[:rows] = packed
    buffers = [torch.empty_like(buffer) for _ in range(ranks)]
    dist.all_gather(buffers, buffer)
    whole = torch.cat([part[: int(count)] for part, count in zip(buffers, counts, strict=True)])
    parts = torch.split(whole, sizes, dim=1)
    return tuple(
        part.reshape(whole.shape[0], *tensor.shape[1:]).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    )
