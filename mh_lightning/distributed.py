"""Collectives that are the identity without a process group. The group is looked up at each call, not before:
Lightning makes it after the layers exist.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

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


class RowExchange:
    """Gives every rank the rows of all ranks, again and again, by one collective of one shape each time.

    Each rank sends 8 bytes that tell how many rows it has, and room for `capacity` rows. Where a rank has more of
    them, all ranks see it alike: a second collective sends the rows, with a larger capacity that stays. So the first
    call takes two collectives, and later ones take one, of the same shape, as long as no rank has more rows than any
    had before; ranks with fewer rows, or with none, send the same number of bytes. A call and rank sends
    8 + capacity · `bytes_of_row` bytes.

    The capacity is no state of a layer: copies and what was pickled begin anew.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> RowExchange()(rows)  # of one process
        (tensor([[1.],
                [2.]]),)
    """

    capacity = 0

    def __getstate__(self) -> dict[str, int]:
        return {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Concatenate the rows of every rank, in rank order.

        Args:
            tensors: each (rows, ...), with the same number of rows on this rank, and equal types and trailing shapes
                on all ranks.
        """
        return self._exchange(tensors)[0]

    def in_turn(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As a call, in the order in which the rows were dealt out to the ranks, one to each in turn."""
        gathered, counts = self._exchange(tensors)
        if len(counts) == 1:
            return gathered
        places = torch.cat([torch.arange(count) for count in counts])
        order = places.argsort(stable=True).to(tensors[0].device)
        return tuple(tensor[order] for tensor in gathered)

    def _exchange(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[int]]:
        rows = len(tensors[0])
        if world_size() == 1:
            return tensors, [rows]
        packed = torch.cat([_as_bytes(tensor) for tensor in tensors], dim=1)
        messages, counts = self._send(packed)
        if max(counts) > self.capacity:
            self.capacity = max(counts)
            messages, counts = self._send(packed)
        whole = torch.cat([part[:count] for part, count in zip(messages, counts, strict=True)])
        parts = torch.split(whole, [bytes_of_row(tensor) for tensor in tensors], dim=1)
        return tuple(_from_bytes(part, tensor) for part, tensor in zip(parts, tensors, strict=True)), counts

    def _send(self, packed: Tensor) -> tuple[list[Tensor], list[int]]:
        """Every rank's bytes (capacity, bytes of a row), and how many of these rows are meant."""
        rows, width = packed.shape
        message = packed.new_zeros(HEADER_BYTES + self.capacity * width)
        message[:HEADER_BYTES] = torch.tensor([rows]).view(torch.uint8)
        if rows <= self.capacity:
            message[HEADER_BYTES : HEADER_BYTES + rows * width] = packed.flatten()
        received = message.new_empty(world_size(), len(message))
        dist.all_gather(list(received.unbind()), message)
        counts: list[int] = received[:, :HEADER_BYTES].cpu().contiguous().view(torch.long).flatten().tolist()
        return list(received[:, HEADER_BYTES:].view(len(counts), self.capacity, width).unbind()), counts


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the rows of every rank once, in rank order; see `RowExchange`. Two collectives."""
    return RowExchange()(*tensors)


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
