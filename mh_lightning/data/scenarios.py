"""Scenarios: pure functions that cut a data set into an ordered list of tasks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import UserError


def class_groups(
    num_classes: int,
    increment: int,
    first_task_size: int | None = None,
    class_order: Sequence[int] | None = None,
    class_order_seed: int | None = None,
) -> list[list[int]]:
    """The classes of each task of a class-incremental stream.

    Args:
        num_classes: C.
        increment: classes a task.
        first_task_size: classes of the first task, by default `increment`.
        class_order: order in which the classes appear, by default 0 to C-1.
        class_order_seed: instead, the order ``numpy.random.RandomState(seed).permutation(C)``, as in published work.

    Raises:
        UserError: if the sizes do not add up to C or the order is no permutation.

    Example:
        >>> class_groups(6, increment=2, class_order=[5, 4, 3, 2, 1, 0])
        [[5, 4], [3, 2], [1, 0]]
    """
    first = increment if first_task_size is None else first_task_size
    if increment < 1 or first < 1:
        raise UserError(f"data.increment and data.first_task_size must be at least 1, got {increment} and {first}.")
    if first > num_classes or (num_classes - first) % increment:
        raise UserError(
            f"data.first_task_size={first} and data.increment={increment} do not add up to the data's "
            f"{num_classes} classes; the classes after the first task must be a multiple of the increment."
        )
    if class_order is not None and class_order_seed is not None:
        raise UserError("data.class_order and data.class_order_seed exclude each other; give one.")
    if class_order_seed is not None and not 0 <= class_order_seed < 2**32:
        raise UserError(f"data.class_order_seed must lie in [0, 2**32), got {class_order_seed}.")
    order = list(range(num_classes)) if class_order is None else list(class_order)
    if class_order_seed is not None:
        order = np.random.RandomState(class_order_seed).permutation(num_classes).tolist()
    if sorted(order) != list(range(num_classes)):
        raise UserError(f"data.class_order must hold each class from 0 to {num_classes - 1} once, got {order}.")
    return [order[:first]] + [order[start : start + increment] for start in range(first, num_classes, increment)]


def class_incremental(labels: NDArray[np.int64], groups: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
    """Indices of the samples of each task, in the data's order.

    Args:
        labels: (samples,).
        groups: the classes of each task.

    Example:
        >>> [task.tolist() for task in class_incremental(np.array([0, 1, 2, 0]), [[2], [0, 1]])]
        [[2], [0, 1, 3]]
    """
    return [np.flatnonzero(np.isin(labels, group)) for group in groups]
