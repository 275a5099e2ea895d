"""Streams whose tasks have no sharp borders: when each training sample comes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import UserError, require


class BlurryBorders:
    """Moves training samples of a class from its own task to others. Test samples stay in their class's task, by which
    accuracies are told.
    """

    def class_groups(self, groups: Sequence[Sequence[int]], generator: np.random.Generator) -> list[list[int]]:
        """The classes of each task, from those of sharp tasks."""
        return [list(group) for group in groups]

    @abstractmethod
    def tasks_of_samples(
        self, labels: NDArray[np.int64], tasks: NDArray[np.int64], num_tasks: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """The task in which each training sample comes, (s,).

        Args:
            labels: classes, (s,).
            tasks: of sharp tasks, (s,).
            num_tasks: T, at least 2.
            generator: of all that is drawn.
        """


def _check(name: str, disjoint: float, minor: float) -> None:
    require(f"data.blurry_borders: {name}.disjoint", disjoint, at_least=0, at_most=1)
    require(f"data.blurry_borders: {name}.minor", minor, at_least=0, at_most=1)


@dataclass(frozen=True)
class IBlurry(BlurryBorders):
    """A part of the classes comes in one task only; of each other class, some samples come in all other tasks.

    Args:
        disjoint: part of the classes, in [0, 1], that come in one task (N of i-Blurry-N-M, as a fraction).
        minor: part of the samples of each other class, in [0, 1], that comes in other tasks (M), evenly.

    Raises:
        UserError: if one is out of range.

    Source: Koh et al., "Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
    Inference", ICLR 2022, section 3.

    Example:
        >>> labels = np.repeat([0, 1], 10)
        >>> blurry = IBlurry(disjoint=0.0, minor=0.2).tasks_of_samples(labels, labels, 2, np.random.default_rng(0))
        >>> [np.bincount(blurry[labels == label]).tolist() for label in (0, 1)]
        [[8, 2], [2, 8]]
    """

    disjoint: float = 0.5
    minor: float = 0.1

    def __post_init__(self) -> None:
        _check("IBlurry", self.disjoint, self.minor)

    def tasks_of_samples(
        self, labels: NDArray[np.int64], tasks: NDArray[np.int64], num_tasks: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """See `BlurryBorders`."""
        moved = tasks.copy()
        for label in _blurry_classes(labels, self.disjoint, generator):
            own = generator.permutation(np.flatnonzero(labels == label))
            minor = own[: round(self.minor * len(own))]
            others = 1 + np.arange(len(minor)) % (num_tasks - 1)
            moved[minor] = (tasks[minor] + others) % num_tasks
        return moved


@dataclass(frozen=True)
class SiBlurry(BlurryBorders):
    """As `IBlurry`, but tasks have random numbers of classes, and the samples that leave their class's task come in
    random ones.

    Args:
        disjoint: part of the classes, in [0, 1], that come in one task.
        minor: part of the samples of each other class, in [0, 1], that is dealt out over all tasks.

    Raises:
        UserError: if one is out of range.

    Source: Moon et al., "Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual
    Prompt Tuning", ICCV 2023, section 3.

    Example:
        >>> groups = SiBlurry().class_groups([[0, 1], [2, 3], [4, 5]], np.random.default_rng(1))
        >>> groups, sorted(label for group in groups for label in group)
        ([[0], [1, 2, 3, 4], [5]], [0, 1, 2, 3, 4, 5])
    """

    disjoint: float = 0.5
    minor: float = 0.1

    def __post_init__(self) -> None:
        _check("SiBlurry", self.disjoint, self.minor)

    def class_groups(self, groups: Sequence[Sequence[int]], generator: np.random.Generator) -> list[list[int]]:
        """Classes in the same order, cut at random places."""
        order = [label for group in groups for label in group]
        cuts = np.sort(1 + generator.permutation(len(order) - 1)[: len(groups) - 1])
        return [part.tolist() for part in np.split(np.array(order), cuts)]

    def tasks_of_samples(
        self, labels: NDArray[np.int64], tasks: NDArray[np.int64], num_tasks: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """See `BlurryBorders`."""
        moved = tasks.copy()
        for label in _blurry_classes(labels, self.disjoint, generator):
            own = generator.permutation(np.flatnonzero(labels == label))
            minor = own[: round(self.minor * len(own))]
            moved[minor] = generator.integers(num_tasks, size=len(minor))
        return moved


@dataclass(frozen=True)
class GaussianSchedule(BlurryBorders):
    """Each class comes and goes: its samples come at times drawn from a normal distribution around the middle of its
    task. The stream, in the order of these times, is then cut into tasks of equal length, which are but the moments of
    evaluation.

    Args:
        width: standard deviation, above 0, in lengths of a task.

    Raises:
        UserError: if it is out of range.

    Source: Shanahan, Kaplanis, Mitrović, "Encoders and Ensembles for Task-Free Continual Learning", 2021, section 4.

    Example:
        >>> labels = np.repeat([0, 1, 2], 100)
        >>> times = GaussianSchedule(0.5).tasks_of_samples(labels, labels, 3, np.random.default_rng(0))
        >>> np.bincount(times).tolist(), [int((times[labels == label] == label).sum()) for label in range(3)]
        ([100, 100, 100], [80, 64, 83])
    """

    width: float = 0.5

    def __post_init__(self) -> None:
        require("data.blurry_borders: GaussianSchedule.width", self.width, above=0, below=float("inf"))

    def tasks_of_samples(
        self, labels: NDArray[np.int64], tasks: NDArray[np.int64], num_tasks: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """See `BlurryBorders`."""
        times = tasks + 0.5 + self.width * generator.standard_normal(len(tasks))
        moved = np.empty_like(tasks)
        moved[np.argsort(times, kind="stable")] = np.arange(len(tasks)) * num_tasks // len(tasks)
        return moved


def _blurry_classes(labels: NDArray[np.int64], disjoint: float, generator: np.random.Generator) -> list[int]:
    classes = np.unique(labels)
    kept = round(disjoint * len(classes))
    return sorted(generator.permutation(classes)[kept:].tolist())


def blurred(
    borders: BlurryBorders,
    labels: NDArray[np.int64],
    samples_of_tasks: Sequence[NDArray[np.int64]],
    generator: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """The training samples of each task, as blurry borders have them.

    Args:
        borders: when samples come.
        labels: classes of all training samples, (s,).
        samples_of_tasks: places of the samples of each sharp task.
        generator: of all that is drawn.

    Raises:
        UserError: if there is one task only, or one is left without samples.
    """
    if len(samples_of_tasks) < 2:
        raise UserError("data.blurry_borders needs a stream of two tasks at least; give a smaller data.increment.")
    places = np.concatenate(samples_of_tasks)
    tasks = np.repeat(np.arange(len(samples_of_tasks)), [len(part) for part in samples_of_tasks])
    moved = borders.tasks_of_samples(labels[places], tasks, len(samples_of_tasks), generator)
    parts = [np.sort(places[moved == task]) for task in range(len(samples_of_tasks))]
    for task, part in enumerate(parts):
        if not len(part):
            raise UserError(f"data.blurry_borders={borders} leaves no training sample to task {task + 1}; blur less.")
    return parts
