"""Buffers: samples that are kept from a stream, the same on all ranks and part of every checkpoint."""

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.sized_by_state import SizedByState

Samples = tuple[Tensor, ...]  # inputs (s, ...), classes (s,), tasks (s,), and what else a buffer keeps


class ReplayBuffer(SizedByState):
    """Room for `capacity` samples, all of the shape of the first one. Subclasses choose which ones stay.

    What is random follows from the seed and the number of samples that have come, so that it needs no state of its own:
    buffers that were saved and loaded, or that other ranks keep, go on alike.

    Args:
        capacity: samples.
        num_classes: C.
        seed: of all that is random here.

    Raises:
        UserError: if the buffer has fewer places than there are classes.
    """

    sized_by_state = ("inputs",)
    same_on_all_ranks = True  # see `mh_lightning.distributed.state_kept_alike`
    inputs: Tensor
    targets: Tensor
    tasks: Tensor
    counts: Tensor

    def __init__(self, capacity: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.capacity, self.num_classes, self.seed = capacity, num_classes, seed
        self.grow(num_classes)
        self.register_buffer("inputs", torch.zeros(0))
        self.register_buffer("targets", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("tasks", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))  # kept, seen, passed since

    def grow(self, num_classes: int) -> None:
        """Keep samples of more classes.

        Raises:
            UserError: if the buffer has fewer places than there are classes.
        """
        if self.capacity < num_classes:
            raise UserError(
                f"model.init_args.buffer_size={self.capacity} is smaller than the {num_classes} classes; each should "
                "have a place at least."
            )
        self.num_classes = num_classes

    def begin_stream(self) -> None:
        """Number the tasks of what is kept -1 and below, since those of a new stream are numbered from 0 on."""
        self.tasks -= int(self.tasks.max()) + 1

    def __len__(self) -> int:
        return int(self.counts[0])

    @property
    def seen(self) -> int:
        """Samples offered so far."""
        return int(self.counts[1])

    def make_room(self, shape: torch.Size) -> None:
        """Make the room for samples of a shape, once.

        Raises:
            UserError: if there is one for another shape.
        """
        if not len(self.inputs):
            self.inputs = self.inputs.new_zeros(self.capacity, *shape)
        if self.inputs.shape[1:] != shape:
            raise UserError(
                f"The replay buffer holds samples of shape {tuple(self.inputs.shape[1:])}, and the stream gives "
                f"{tuple(shape)}; give images of that size, or features as before."
            )

    @property
    def parts(self) -> Samples:
        """What is kept of each sample, one row a place."""
        return self.inputs, self.targets, self.tasks

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor, *more: Tensor) -> None:
        """Offer samples (b, ...) with their classes (b,), tasks (b,) and the other parts, as if one after the other.

        Raises:
            UserError: if samples of another shape are kept.
        """
        self.make_room(inputs.shape[1:])
        kept, seen, _ = self.counts.tolist()
        classes = self.targets.cpu().numpy().copy()
        row_of_place: dict[int, int] = {}
        for row, label in enumerate(targets.tolist()):
            place: int | None = kept
            if kept == self.capacity:
                place = self._place(label, classes, seen, np.random.default_rng([self.seed, seen, 0]))
            if place is not None:
                row_of_place[place] = row
                classes[place] = label
                kept = max(kept, place + 1)
            seen += 1
        if row_of_place:
            places, rows = (
                torch.tensor(list(part), device=inputs.device) for part in (row_of_place.keys(), row_of_place.values())
            )
            for buffer, values in zip(self.parts, (inputs, targets, *more), strict=True):
                buffer[places] = values[rows].to(buffer.dtype)
        self.counts.copy_(torch.tensor([kept, seen, 0]))

    @torch.no_grad()
    def replace(self, *samples: Tensor) -> None:
        """Keep these samples, at most `capacity`, and no others."""
        kept = len(samples[0])
        self.make_room(samples[0].shape[1:])
        for buffer, values in zip(self.parts, samples, strict=True):
            buffer[:kept] = values.to(buffer.dtype)
        self.counts[0] = kept

    def pass_by(self, samples: int) -> None:
        """Let samples of the stream pass without offering them, so that what is drawn afterwards differs."""
        self.counts[2] += samples

    @abstractmethod
    def _place(self, label: int, classes: NDArray[np.int64], seen: int, generator: np.random.Generator) -> int | None:
        """Where the next sample goes in a full buffer of these classes, after `seen` others; None leaves it out."""

    def draw(self, count: int, before_task: int | None = None, turn: int = 0) -> Samples | None:
        """At most `count` different samples, at random, in no particular order; None if there is none.

        Args:
            count: samples.
            before_task: only samples of earlier tasks.
            turn: another one draws anew, before more samples have come.
        """
        places = np.arange(len(self))
        if before_task is not None:
            places = places[self.tasks[: len(self)].cpu().numpy() < before_task]
        if not len(places):
            return None
        generator = np.random.default_rng([self.seed, self.seen, 1 + turn, int(self.counts[2])])
        drawn = torch.from_numpy(generator.choice(places, min(count, len(places)), replace=False))
        drawn = drawn.to(self.targets.device)
        return tuple(part[drawn] for part in self.parts)

    def content(self) -> Samples:
        """All samples that are kept."""
        return tuple(part[: len(self)] for part in self.parts)


class ReservoirBuffer(ReplayBuffer):
    """Each sample of the stream is kept with the same probability.

    Source: Vitter, "Random Sampling with a Reservoir", ACM Transactions on Mathematical Software 1985, algorithm R.

    Example:
        >>> buffer = ReservoirBuffer(2, num_classes=2)
        >>> buffer.add(torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0]), torch.zeros(5))
        >>> len(buffer), buffer.seen
        (2, 5)
    """

    def _place(self, label: int, classes: NDArray[np.int64], seen: int, generator: np.random.Generator) -> int | None:
        place = int(generator.integers(seen + 1))
        return place if place < self.capacity else None


class RandomReplacementBuffer(ReplayBuffer):
    """Each new sample replaces a random one, so that the newest prevail."""

    def _place(self, label: int, classes: NDArray[np.int64], seen: int, generator: np.random.Generator) -> int | None:
        return int(generator.integers(self.capacity))


class ClassBalancedBuffer(ReplayBuffer):
    """Greedy balance: once the buffer is full, a sample replaces a random one of the largest class, unless its own is
    among the largest.

    Source: Prabhu, Torr, Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning",
    ECCV 2020, algorithm 1.
    """

    def _place(self, label: int, classes: NDArray[np.int64], seen: int, generator: np.random.Generator) -> int | None:
        sizes = np.bincount(classes, minlength=self.num_classes)
        if sizes[label] == sizes.max():
            return None
        return int(generator.choice(np.flatnonzero(classes == sizes.argmax())))
