"""Cutting a data set into tasks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mh_lightning.data.scenarios import SCENARIOS, Task, class_groups, samples_of_tasks, tasks_of_scenario
from tests.data.refusal import refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"increment": 1}, [[0], [1], [2], [3], [4], [5]]),
        ({"increment": 3}, [[0, 1, 2], [3, 4, 5]]),
        ({"increment": 6}, [[0, 1, 2, 3, 4, 5]]),
        ({"increment": 2, "first_task_size": 4}, [[0, 1, 2, 3], [4, 5]]),
        ({"increment": 5, "first_task_size": 1}, [[0], [1, 2, 3, 4, 5]]),
        ({"increment": 4, "first_task_size": 6}, [[0, 1, 2, 3, 4, 5]]),
        ({"increment": 2, "first_task_size": 1, "last_task_size": 1}, [[0], [1, 2], [3, 4], [5]]),
        ({"increment": 4, "last_task_size": 2, "class_order": [3, 5, 0, 1, 4, 2]}, [[3, 5, 0, 1], [4, 2]]),
        ({"increment": 9, "first_task_size": 5, "last_task_size": 1}, [[0, 1, 2, 3, 4], [5]]),
        ({"increment": 2, "class_order": [3, 5, 0, 1, 4, 2]}, [[3, 5], [0, 1], [4, 2]]),
        ({"increment": 3, "class_order": (5, 4, 3, 2, 1, 0), "first_task_size": 3}, [[5, 4, 3], [2, 1, 0]]),
    ],
)
def test_class_groups(options: dict, expected: list[list[int]]) -> None:
    assert class_groups(6, **options) == expected


@pytest.mark.parametrize("seed", [0, 1993])
def test_seeded_order_is_the_published_one(seed: int) -> None:
    groups = class_groups(100, 10, class_order_seed=seed)
    order = np.random.RandomState(seed).permutation(100)
    assert groups == order.reshape(10, 10).tolist()
    assert all(type(label) is int for group in groups for label in group)
    assert groups == class_groups(100, 10, class_order_seed=seed) != class_groups(100, 10)


def test_seeded_order_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    class_groups(10, 2, class_order_seed=0)
    assert np.random.rand() == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"increment": 4}, ("data.increment=4", "do not add up", "10 classes", "give data.last_task_size=2")),
        (
            {"increment": 4, "last_task_size": 3},
            ("data.last_task_size=3 and data.increment=4", "between the first and the last task"),
        ),
        ({"increment": 4, "last_task_size": 7}, ("data.last_task_size=7 and data.increment=4", "do not add up")),
        ({"increment": 4, "last_task_size": 0}, ("data.last_task_size", "got 0")),
        ({"increment": 3, "first_task_size": 3}, ("data.first_task_size=3", "data.increment=3")),
        ({"increment": 2, "first_task_size": 11}, ("data.first_task_size=11",)),
        ({"increment": 11}, ("data.increment=11",)),
        ({"increment": 0}, ("data.increment", "got 0")),
        ({"increment": -2}, ("data.increment", "got -2")),
        ({"increment": 1, "first_task_size": 0}, ("data.first_task_size", "got 0")),
        (
            {"increment": 1, "class_order": list(range(10)), "class_order_seed": 0},
            ("data.class_order and data.class_order_seed exclude each other",),
        ),
        ({"increment": 1, "class_order": list(range(9))}, ("data.class_order", "0 to 9")),
        ({"increment": 1, "class_order": [0, *range(9)]}, ("data.class_order",)),
        ({"increment": 1, "class_order": list(range(1, 11))}, ("data.class_order",)),
        ({"increment": 1, "class_order": []}, ("data.class_order",)),
        ({"increment": 1, "class_order_seed": -1}, ("data.class_order_seed",)),
        ({"increment": 1, "class_order_seed": 2**32}, ("data.class_order_seed",)),
    ],
)
def test_refused_groups(options: dict, parts: tuple[str, ...]) -> None:
    refused(lambda: class_groups(10, **options), *parts)


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=40), st.permutations(range(6)), st.integers(1, 5))
def test_tasks_partition_the_classes(labels: list[int], order: list[int], cut: int) -> None:
    array = np.array(labels, dtype=np.int64)
    groups = [order[:cut], order[cut:]]  # classes 6 and 7 belong to no task
    tasks = samples_of_tasks(array, np.zeros_like(array), [Task(group) for group in groups])
    assert len(tasks) == 2
    for indices, group in zip(tasks, groups, strict=True):
        assert indices.tolist() == [index for index, label in enumerate(labels) if label in group]
    listed = sorted(index for indices in tasks for index in indices.tolist())
    assert listed == [index for index, label in enumerate(labels) if label < 6]


CDI = [([2, 0], 0), ([1], 0), ([2, 0], 1), ([1], 1), ([2, 0], 2), ([1], 2)]


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("IID", [([2, 0, 1], None)]),
        ("CI", [([2, 0], None), ([1], None)]),
        ("DI", [([2, 0, 1], 0), ([2, 0, 1], 1), ([2, 0, 1], 2)]),
        ("CDI", CDI),
        ("CDID", CDI),
    ],
)
def test_scenarios(scenario: str, expected: list[tuple[list[int], int | None]]) -> None:
    assert [tuple(task) for task in tasks_of_scenario(scenario, [[2, 0], [1]], 3)] == expected


def test_unknown_scenario() -> None:
    refused(lambda: tasks_of_scenario("cdi", [[0]], 1), "data.scenario", "IID, CI, DI, CDI, CDID", "'cdi'")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60),
    st.permutations(range(6)),
    st.integers(1, 5),
    st.sampled_from(SCENARIOS),
)
def test_tasks_partition_the_samples(samples: list[tuple[int, int]], order: list[int], cut: int, scenario: str) -> None:
    labels, domains = np.array(samples, dtype=np.int64).reshape(-1, 2).T
    tasks = tasks_of_scenario(scenario, [order[:cut], order[cut:]], 3)
    parts = samples_of_tasks(labels, domains, tasks)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(samples)))
    for task, part in zip(tasks, parts, strict=True):
        assert part.tolist() == sorted(part) and set(labels[part]) <= set(task.classes)
        assert task.domain is None or set(domains[part]) <= {task.domain}
