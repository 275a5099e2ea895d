"""Collectives that are the identity without a process group. The group is looked up at each call, not before:
Lightning makes it after the layers exist.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mh_lightning.errors import UserError

HEADER_BYTES = 8  # the number of rows that follow


def in_process_group() -> bool:
    """Whether there is a process group, if only of one process."""
    return dist.is_available() and dist.is_initialized()


def leave_process_group() -> None:
    """Destroy the process group, if any: gloo's threads, which Lightning leaves running, can abort a process at its end
    (pytorch/pytorch#190489). Not to be called while other ranks wait for this one.
    """
    if in_process_group():
        dist.destroy_process_group()


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


# --- rows of all ranks

# the most rows that a rank has sent so far, by the process group and the bytes of a row
_capacities: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give every rank the rows of all ranks, in rank order, by one collective of one shape each time.

    Each rank sends 8 bytes that tell how many rows it has, and room for as many rows as any rank has ever had. Where a
    rank has more of them, all ranks see it alike: a second collective sends the rows, and the larger room stays. So the
    first call takes two collectives, and later ones take one, of the same shape, as long as no rank has more rows than
    any had before; ranks with fewer rows, or with none, send the same number of bytes. A call and rank sends 8 + room ·
    `bytes_of_row` bytes.

    Room is shared by all that send rows of as many bytes, and belongs to the process group, not to what calls: all
    ranks take part in the same collectives, so they agree on it, whatever they have copied, unpickled or made anew.

    Args:
        tensors: each (rows, ...), with the same number of rows on this rank, and equal types and trailing shapes on all
            ranks.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> gather_rows(rows)  # of one process
        (tensor([[1.],
                [2.]]),)
    """
    return _exchange(tensors)[0]


def gather_in_turn(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As `gather_rows`, in the order in which the rows were dealt out to the ranks, one to each in turn."""
    gathered, counts = _exchange(tensors)
    if len(counts) == 1:
        return gathered
    places = torch.cat([torch.arange(count) for count in counts])
    order = places.argsort(stable=True).to(tensors[0].device)
    return tuple(tensor[order] for tensor in gathered)


def _exchange(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[int]]:
    rows = len(tensors[0])
    if world_size() == 1:
        return tensors, [rows]
    packed = torch.cat([_as_bytes(tensor) for tensor in tensors], dim=1)
    capacities = _capacities.setdefault(dist.group.WORLD, {})
    width = packed.shape[1]
    capacity = capacities.get(width, 0)
    messages, counts = _send(packed, capacity)
    if max(counts) > capacity:
        capacities[width] = max(counts)
        messages, counts = _send(packed, max(counts))
    whole = torch.cat([part[:count] for part, count in zip(messages, counts, strict=True)])
    parts = torch.split(whole, [bytes_of_row(tensor) for tensor in tensors], dim=1)
    return tuple(_from_bytes(part, tensor) for part, tensor in zip(parts, tensors, strict=True)), counts


def _send(packed: Tensor, capacity: int) -> tuple[list[Tensor], list[int]]:
    """Every rank's bytes (capacity, bytes of a row), and how many of these rows are meant."""
    rows, width = packed.shape
    message = packed.new_zeros(HEADER_BYTES + capacity * width)
    message[:HEADER_BYTES] = torch.tensor([rows]).view(torch.uint8)
    if rows <= capacity:
        message[HEADER_BYTES : HEADER_BYTES + rows * width] = packed.flatten()
    received = message.new_empty(world_size(), len(message))
    dist.all_gather(list(received.unbind()), message)
    counts: list[int] = received[:, :HEADER_BYTES].cpu().contiguous().view(torch.long).flatten().tolist()
    return list(received[:, HEADER_BYTES:].view(len(counts), capacity, width).unbind()), counts


def bytes_of_row(*tensors: Tensor) -> int:
    """Bytes that a row of each of the tensors (rows, ...) takes together.

    Example:
        >>> bytes_of_row(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
        20
    """
    return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)


def _as_bytes(tensor: Tensor) -> Tensor:
    """(rows, bytes of a row)."""
    rows = tensor.detach().reshape(len(tensor), math.prod(tensor.shape[1:]))
    return _unstrided(rows).view(torch.uint8)


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    return _unstrided(rows).view(like.dtype).view(len(rows), *like.shape[1:])


def _unstrided(rows: Tensor) -> Tensor:
    """A copy: other bytes, and single rows or columns of them, cannot always be viewed as another type."""
    return rows.clone(memory_format=torch.contiguous_format)


def refuse_joining(name: str) -> None:
    """Refuse a training forward of a module that exchanges rows, where some ranks may have run out of batches.

    Raises:
        UserError: on all ranks, inside of ``torch.distributed.algorithms.join.Join``: ranks that have joined answer
            DistributedDataParallel's collectives only, and the others would wait for them.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None and wrapper._join_config.enable and world_size() > 1:
        raise UserError(
            f"{name}: keys learn from all ranks in each step, so Join cannot stand in for ranks that have no batch "
            "left; give these empty batches (of 0 rows) instead."
        )


# --- state that is the same on all ranks


def state_kept_alike(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module that all ranks hold alike without being sent, by name: buffers, and parameters that are
    not trained, of each module that says so by an attribute ``same_on_all_ranks = True``.
    """
    found: set[int] = set()
    for prefix, part in module.named_modules():
        if getattr(part, "same_on_all_ranks", False):
            frozen = ((name, value) for name, value in part.named_parameters() if not value.requires_grad)
            for name, value in (*part.named_buffers(), *frozen):
                if id(value) not in found:
                    found.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value


@torch.no_grad()
def broadcast_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
