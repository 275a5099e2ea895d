"""Scenarios: pure functions that cut a data set into an ordered list of tasks."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import UserError, require

SCENARIOS = ("IID", "CI", "DI", "CDI", "CDID")


class Task(NamedTuple):
    """What a task is made of: some classes, in one domain or in all of them."""

    classes: list[int]
    domain: int | None = None


def class_groups(
    num_classes: int,
    increment: int | Sequence[int],
    first_task_size: int | None = None,
    class_order: Sequence[int] | None = None,
    class_order_seed: int | None = None,
    last_task_size: int | None = None,
) -> list[list[int]]:
    """The classes of each task of a class-incremental stream.

    Args:
        num_classes: C.
        increment: classes a task, or of each task.
        first_task_size: classes of the first task, by default `increment`.
        class_order: order in which the classes appear, by default 0 to C-1.
        class_order_seed: instead, the order ``numpy.random.RandomState(seed).permutation(C)``, as in published work.
        last_task_size: classes of the last task, by default `increment`.

    Raises:
        UserError: if the sizes do not add up to C or the order is no permutation.

    Example:
        >>> class_groups(6, increment=2, class_order=[5, 4, 3, 2, 1, 0])
        [[5, 4], [3, 2], [1, 0]]
        >>> class_groups(6, increment=2, first_task_size=1, last_task_size=1)
        [[0], [1, 2], [3, 4], [5]]
        >>> class_groups(6, increment=[3, 1, 2])
        [[0, 1, 2], [3], [4, 5]]
    """
    order = _order(num_classes, class_order, class_order_seed)
    if not isinstance(increment, int):
        return _groups_of_sizes(order, increment, first_task_size, last_task_size)
    first = increment if first_task_size is None else first_task_size
    last = 0 if last_task_size is None else last_task_size
    for name, size in (("increment", increment), ("first_task_size", first), ("last_task_size", last_task_size)):
        require(f"data.{name}", size, at_least=1)
    between = num_classes - first - last
    if between < 0 or between % increment:
        sizes = {"first_task_size": first_task_size, "last_task_size": last_task_size, "increment": increment}
        given = [f"data.{name}={size}" for name, size in sizes.items() if size is not None]
        place = " between the first and the last task" if last else " after the first task" if len(given) > 1 else ""
        rest = f", or give data.last_task_size={between % increment}" if between > 0 and not last else ""
        raise UserError(
            f"Tasks of {' and '.join(given)} classes do not add up to the data's {num_classes} classes; the classes"
            f"{place} must be a multiple of the increment{rest}."
        )
    starts = range(first, first + between, increment)
    groups = [order[:first], *(order[start : start + increment] for start in starts)]
    return [*groups, order[-last:]] if last else groups


def _order(num_classes: int, class_order: Sequence[int] | None, class_order_seed: int | None) -> list[int]:
    if class_order is not None and class_order_seed is not None:
        raise UserError("data.class_order and data.class_order_seed exclude each other; give one.")
    require("data.class_order_seed", class_order_seed, at_least=0, below=2**32)
    order: list[int] = list(range(num_classes)) if class_order is None else list(class_order)
    if class_order_seed is not None:
        order = np.random.RandomState(class_order_seed).permutation(num_classes).tolist()
    if sorted(order) != list(range(num_classes)):
        raise UserError(f"data.class_order must hold each class from 0 to {num_classes - 1} once, got {order}.")
    return order


def _groups_of_sizes(order: list[int], sizes: Sequence[int], first: int | None, last: int | None) -> list[list[int]]:
    if first is not None or last is not None:
        raise UserError("data.first_task_size and data.last_task_size are for an increment that is one number.")
    for size in sizes:
        require("data.increment", size, at_least=1)
    if sum(sizes) != len(order):
        raise UserError(
            f"data.increment={list(sizes)} adds up to {sum(sizes)} classes, and the data have {len(order)}; give sizes "
            "that add up to them."
        )
    ends = np.cumsum(sizes).tolist()
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def tasks_of_scenario(scenario: str, groups: Sequence[Sequence[int]], num_domains: int) -> list[Task]:
    """The tasks of a stream.

    Args:
        scenario: "IID" (one task of everything), "CI" (class-incremental: one group of classes after the other), "DI"
            (domain-incremental: all classes, one domain after the other), "CDI" (class- and domain-incremental: in each
            domain one group after the other) or "CDID" (CDI with the samples of a task in the order of their first
            feature, so that the data drifts inside it).
        groups: of classes, see `class_groups`.
        num_domains: D.

    Raises:
        UserError: on an unknown scenario.

    Example:
        >>> [tuple(task) for task in tasks_of_scenario("CDI", [[0], [1]], num_domains=2)]
        [([0], 0), ([1], 0), ([0], 1), ([1], 1)]
    """
    everything = [label for group in groups for label in group]
    if scenario == "IID":
        return [Task(everything)]
    if scenario == "CI":
        return [Task(list(group)) for group in groups]
    if scenario == "DI":
        return [Task(everything, domain) for domain in range(num_domains)]
    if scenario in ("CDI", "CDID"):
        return [Task(list(group), domain) for domain in range(num_domains) for group in groups]
    raise UserError(f"data.scenario must be one of {', '.join(SCENARIOS)}; got {scenario!r}.")


def samples_of_tasks(
    labels: NDArray[np.int64], domains: NDArray[np.int64], tasks: Sequence[Task]
) -> list[NDArray[np.int64]]:
    """Indices of the samples of each task, in the data's order, in time linear in samples and tasks.

    Args:
        labels: (samples,).
        domains: (samples,).
        tasks: from `tasks_of_scenario`: none shares a class of a domain with another.

    Example:
        >>> parts = samples_of_tasks(np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1]), [Task([2]), Task([0, 1], 0)])
        >>> [part.tolist() for part in parts]
        [[2], [0, 1]]
    """
    tasks_of_domain: dict[int | None, list[int]] = {}
    for number, task in enumerate(tasks):
        tasks_of_domain.setdefault(task.domain, []).append(number)
    task_of_sample = np.full(len(labels), -1)
    task_of_class = np.full(1 + max([labels.max(initial=0), *(max(task.classes) for task in tasks)]), -1)
    by_domain = np.argsort(domains, kind="stable")
    for domain, numbers in tasks_of_domain.items():
        for number in numbers:
            task_of_class[tasks[number].classes] = number
        inside = by_domain
        if domain is not None:
            inside = by_domain[slice(*np.searchsorted(domains, (domain, domain + 1), sorter=by_domain))]
        found = task_of_class[labels[inside]]
        task_of_sample[inside[found >= 0]] = found[found >= 0]
        for number in numbers:
            task_of_class[tasks[number].classes] = -1
    by_task = np.argsort(task_of_sample, kind="stable")
    ends = np.searchsorted(task_of_sample, np.arange(len(tasks) + 1), sorter=by_task)
    return [by_task[start:end] for start, end in itertools.pairwise(ends)]


def task_of_samples(parts: Sequence[NDArray[np.int64]], num_samples: int) -> NDArray[np.int64]:
    """Task of each sample, (samples,).

    Args:
        parts: from `samples_of_tasks`.
        num_samples: in all.

    Example:
        >>> task_of_samples([np.array([2]), np.array([0, 1])], 3).tolist()
        [1, 1, 0]
    """
    tasks = np.empty(num_samples, dtype=np.int64)
    tasks[np.concatenate(parts)] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return tasks
