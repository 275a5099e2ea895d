"""The pure functions, on matrices worked by hand and against loops that spell the definitions out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mh_lightning.metrics import functional

# forgets the first task, gains on the second one
FORGETS = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.9, 0.7]], dtype=torch.float64)
# gains on both, and knew the second task best before it was learnt
GAINS = torch.tensor([[0.5, 0.6, 0.0], [0.9, 0.4, 0.0], [0.7, 0.5, 1.0]], dtype=torch.float64)
UNTRAINED = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SAMPLES = torch.tensor([10, 20, 70])


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (
            FORGETS,
            {
                "average_accuracy": (0.5 + 0.9 + 0.7) / 3,
                "forgetting": ((0.9 - 0.5) + (0.8 - 0.9)) / 2,
                "backward_transfer": ((0.5 - 0.9) + (0.9 - 0.8)) / 2,
                "forward_transfer": ((0.2 - 0.3) + (0.3 - 0.2)) / 2,
                "all_pairs_backward_transfer": ((0.6 - 0.9) + (0.5 - 0.9) + (0.9 - 0.8)) / 3,
                "all_pairs_backward_transfer_clipped": 0.0,
                "all_pairs_forward_transfer": (0.2 + 0.1 + 0.3) / 3,
                "last_accuracy": (5 + 18 + 49) / 100,
                "last_accuracy_old": (5 + 18) / 30,
                "last_accuracy_new": 0.7,
                "incremental_accuracy": (9 / 10 + (6 + 16) / 30 + 72 / 100) / 3,
            },
        ),
        (
            GAINS,
            {
                "average_accuracy": 2.2 / 3,
                "forgetting": ((0.9 - 0.7) + (0.6 - 0.5)) / 2,
                "backward_transfer": ((0.7 - 0.5) + (0.5 - 0.4)) / 2,
                "forward_transfer": ((0.6 - 0.3) + (0.0 - 0.2)) / 2,
                "all_pairs_backward_transfer": (0.4 + 0.2 + 0.1) / 3,
                "all_pairs_backward_transfer_clipped": 0.7 / 3,
                "all_pairs_forward_transfer": 0.2,
                "last_accuracy": (7 + 10 + 70) / 100,
                "last_accuracy_old": (7 + 10) / 30,
                "last_accuracy_new": 1.0,
                "incremental_accuracy": (5 / 10 + (9 + 8) / 30 + 87 / 100) / 3,
            },
        ),
        (
            FORGETS[:2, :2],
            {
                "average_accuracy": 0.7,
                "forgetting": 0.3,
                "backward_transfer": -0.3,
                "forward_transfer": 0.2 - 0.3,
                "all_pairs_backward_transfer": -0.3,
                "all_pairs_backward_transfer_clipped": 0.0,
                "all_pairs_forward_transfer": 0.2,
                "last_accuracy": 22 / 30,
                "last_accuracy_old": 0.6,
                "last_accuracy_new": 0.8,
                "incremental_accuracy": (27 + 22) / 60,
            },
        ),
        (
            FORGETS[:1, :1],
            {
                "average_accuracy": 0.9,
                "forgetting": 0.0,
                "all_pairs_backward_transfer": 0.0,
                "all_pairs_backward_transfer_clipped": 0.0,
                "backward_transfer": 0.0,
                "forward_transfer": 0.0,
                "all_pairs_forward_transfer": 0.0,
                "last_accuracy": 0.9,
                "last_accuracy_old": float("nan"),
                "last_accuracy_new": 0.9,
                "incremental_accuracy": 0.9,
            },
        ),
    ],
    ids=["forgets", "gains", "two tasks", "one task"],
)
def test_by_hand(matrix: Tensor, expected: dict[str, float]) -> None:
    samples = SAMPLES[: len(matrix)]
    found = {
        "average_accuracy": functional.average_accuracy(matrix),
        "forgetting": functional.forgetting(matrix),
        "backward_transfer": functional.backward_transfer(matrix),
        "forward_transfer": functional.forward_transfer(matrix, UNTRAINED[: len(matrix)]),
        "all_pairs_backward_transfer": functional.all_pairs_backward_transfer(matrix),
        "all_pairs_backward_transfer_clipped": functional.all_pairs_backward_transfer(matrix, clip=True),
        "all_pairs_forward_transfer": functional.all_pairs_forward_transfer(matrix),
        "last_accuracy": functional.last_accuracy(matrix, samples),
        "last_accuracy_old": functional.last_accuracy_old(matrix, samples),
        "last_accuracy_new": functional.last_accuracy_new(matrix),
        "incremental_accuracy": functional.incremental_accuracy(matrix, samples),
    }
    for name, value in found.items():
        assert value.shape == () and value.dtype == torch.float64, name
        assert value.item() == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name


def test_plain_names_mean_what_gem_means() -> None:
    matrix = torch.tensor([[0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]], dtype=torch.float64)
    untrained = torch.tensor([0.3, 0.1, 0.4], dtype=torch.float64)
    assert functional.backward_transfer(matrix).item() == pytest.approx(-0.25)
    assert functional.forward_transfer(matrix, torch.zeros(3)).item() == pytest.approx(0.25)
    assert functional.forward_transfer(matrix, untrained).item() == pytest.approx(0.25 - (0.1 + 0.4) / 2)
    assert functional.all_pairs_backward_transfer(matrix).item() == pytest.approx(-0.8 / 3)
    assert functional.all_pairs_forward_transfer(matrix).item() == pytest.approx(0.2)


def test_equal_counts_weigh_tasks_alike() -> None:
    assert functional.last_accuracy(FORGETS, torch.tensor([7, 7, 7])).item() == pytest.approx(0.7)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_against_the_definitions(num_tasks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64)
    samples = torch.randint(1, 50, (num_tasks,), generator=generator)
    a, n, tasks = matrix.tolist(), samples.tolist(), range(num_tasks)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    def seen(after: int) -> float:
        return sum(n[j] * a[after][j] for j in range(after + 1)) / sum(n[: after + 1])

    forgotten = [max(a[i][j] for i in tasks[:-1]) - a[-1][j] for j in tasks[:-1]]
    untrained = torch.rand(num_tasks, generator=generator, dtype=torch.float64)
    b = untrained.tolist()
    expected = {
        functional.average_accuracy(matrix): mean(a[-1]),
        functional.forgetting(matrix): mean(forgotten),
        functional.backward_transfer(matrix): mean([a[-1][j] - a[j][j] for j in tasks[:-1]]),
        functional.forward_transfer(matrix, untrained): mean([a[j - 1][j] - b[j] for j in tasks[1:]]),
        functional.all_pairs_backward_transfer(matrix): mean([a[i][j] - a[j][j] for i in tasks for j in range(i)]),
        functional.all_pairs_forward_transfer(matrix): mean([a[i][j] for j in tasks for i in range(j)]),
        functional.last_accuracy(matrix, samples): seen(num_tasks - 1),
        functional.incremental_accuracy(matrix, samples): mean([seen(after) for after in tasks]),
    }
    for value, by_loops in expected.items():
        assert value.item() == pytest.approx(by_loops, abs=1e-12)


def test_data_of_the_first_tasks_alone() -> None:
    # after three tasks, evaluated on the first two
    matrix = torch.tensor([[0.9, 0.1], [0.6, 0.8], [0.3, 1.0]])
    assert functional.average_accuracy(matrix).item() == pytest.approx(0.65)
    assert functional.forgetting(matrix).item() == pytest.approx(((0.9 - 0.3) + (0.8 - 1.0)) / 2)
    assert functional.all_pairs_backward_transfer(matrix).item() == pytest.approx(
        ((0.6 - 0.9) + (0.3 - 0.9) + (1.0 - 0.8)) / 3
    )
    assert functional.all_pairs_forward_transfer(matrix).item() == pytest.approx(0.1)
    assert functional.backward_transfer(matrix).item() == pytest.approx(((0.3 - 0.9) + (1.0 - 0.8)) / 2)
    assert functional.forward_transfer(matrix, torch.tensor([0.7, 0.3])).item() == pytest.approx(0.1 - 0.3)
    samples = torch.tensor([10, 30])
    assert functional.last_accuracy(matrix, samples).item() == pytest.approx((3 + 30) / 40)
    assert functional.incremental_accuracy(matrix, samples).item() == pytest.approx((0.9 + 30 / 40 + 33 / 40) / 3)
    assert functional.last_accuracy_old(matrix, samples).item() == pytest.approx((3 + 30) / 40)
    assert functional.last_accuracy_new(matrix).isnan()
    # with one task evaluated, nothing of it is to come
    assert functional.all_pairs_forward_transfer(matrix[:, :1]).item() == 0
    assert functional.forward_transfer(matrix[:, :1], torch.tensor([0.7])).item() == 0


# five tasks, evaluated after the second, the fourth and the last
SPACED = torch.tensor(
    [[0.9, 0.8, 0.2, 0.1, 0.3], [0.6, 0.9, 0.7, 0.5, 0.2], [0.5, 0.6, 0.8, 0.4, 1.0]], dtype=torch.float64
)
UNTRAINED_OF_FIVE = torch.tensor([0.15, 0.05, 0.25, 0.45, 0.35], dtype=torch.float64)


@pytest.mark.parametrize(
    ("evaluations", "columns", "expected"),
    [
        (
            3,
            5,
            {
                "average_accuracy": 3.3 / 5,
                "forgetting": ((0.9 - 0.5) + (0.9 - 0.6) + (0.7 - 0.8) + (0.5 - 0.4)) / 4,
                "backward_transfer": ((0.6 - 0.8) + (0.4 - 0.5)) / 2,
                "forward_transfer": ((0.2 - 0.25) + (0.2 - 0.35)) / 2,
                # only the second and the fourth task were evaluated when they had just been learnt
                "all_pairs_backward_transfer": ((0.9 - 0.8) + (0.6 - 0.8) + (0.4 - 0.5)) / 3,
                "all_pairs_forward_transfer": (0.2 + 0.1 + 0.3 + 0.2) / 4,
                "last_accuracy": (5 + 12 + 24 + 16 + 100) / 200,
                "last_accuracy_old": (5 + 12 + 24 + 16) / 100,
                "last_accuracy_new": 1.0,
                "incremental_accuracy": ((9 + 16) / 30 + (6 + 18 + 21 + 20) / 100 + 157 / 200) / 3,
            },
        ),
        (
            2,
            4,
            {
                "average_accuracy": 2.7 / 4,
                # of the third and the fourth task nobody knows how good they were before
                "forgetting": ((0.9 - 0.6) + (0.8 - 0.9)) / 2,
                "backward_transfer": 0.9 - 0.8,
                "forward_transfer": 0.2 - 0.25,
                "all_pairs_backward_transfer": 0.9 - 0.8,
                "all_pairs_forward_transfer": (0.2 + 0.1) / 2,
                "last_accuracy": 0.65,
                "last_accuracy_old": (6 + 18 + 21) / 60,
                "last_accuracy_new": 0.5,
                "incremental_accuracy": (25 / 30 + 0.65) / 2,
            },
        ),
        (
            3,
            3,  # there is data of the first three tasks alone
            {
                "average_accuracy": 1.9 / 3,
                "forgetting": ((0.9 - 0.5) + (0.9 - 0.6) + (0.7 - 0.8)) / 3,
                "backward_transfer": 0.6 - 0.8,
                "forward_transfer": 0.2 - 0.25,
                "all_pairs_backward_transfer": ((0.9 - 0.8) + (0.6 - 0.8)) / 2,
                "all_pairs_forward_transfer": 0.2,
                "last_accuracy": (5 + 12 + 24) / 60,
                "last_accuracy_old": (5 + 12 + 24) / 60,
                "last_accuracy_new": float("nan"),
                "incremental_accuracy": (25 / 30 + (6 + 18 + 21) / 60 + 41 / 60) / 3,
            },
        ),
        (
            1,
            2,
            {
                "average_accuracy": 0.85,
                # there was an earlier task, and no evaluation when it had just been learnt
                "forgetting": float("nan"),
                "backward_transfer": float("nan"),
                "forward_transfer": float("nan"),
                "all_pairs_backward_transfer": float("nan"),
                "all_pairs_forward_transfer": float("nan"),
                "last_accuracy": 25 / 30,
                "last_accuracy_old": 0.9,
                "last_accuracy_new": 0.8,
                "incremental_accuracy": 25 / 30,
            },
        ),
    ],
    ids=["all", "two evaluations", "first tasks", "one evaluation"],
)
def test_spaced_evaluations_by_hand(evaluations: int, columns: int, expected: dict[str, float]) -> None:
    matrix, after = SPACED[:evaluations, :columns], [2, 4, 5][:evaluations]
    samples = torch.tensor([10, 20, 30, 40, 100])[:columns]
    found = {
        "average_accuracy": functional.average_accuracy(matrix),
        "forgetting": functional.forgetting(matrix, after),
        "backward_transfer": functional.backward_transfer(matrix, after),
        "forward_transfer": functional.forward_transfer(matrix, UNTRAINED_OF_FIVE[:columns], after),
        "all_pairs_backward_transfer": functional.all_pairs_backward_transfer(matrix, after=after),
        "all_pairs_forward_transfer": functional.all_pairs_forward_transfer(matrix, after),
        "last_accuracy": functional.last_accuracy(matrix, samples),
        "last_accuracy_old": functional.last_accuracy_old(matrix, samples, after),
        "last_accuracy_new": functional.last_accuracy_new(matrix, after),
        "incremental_accuracy": functional.incremental_accuracy(matrix, samples, after),
    }
    for name, value in found.items():
        assert value.shape == () and value.item() == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name


def test_spaced_evaluations_of_which_none_follows_a_task_with_data() -> None:
    assert functional.all_pairs_backward_transfer(torch.tensor([[0.9], [0.5]]), after=[3, 6]).isnan()
    assert functional.backward_transfer(torch.tensor([[0.9], [0.5]]), after=[3, 6]).isnan()
    assert functional.forgetting(torch.tensor([[0.9], [0.5]]), after=[3, 6]).item() == pytest.approx(0.4)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_most_likely_classes(k: int, more: int, seed: int) -> None:
    # few different values, so that there are ties
    logits = torch.randint(0, 4, (9, k + more), generator=torch.Generator().manual_seed(seed)).float()
    found = functional.most_likely(logits, k)
    assert torch.equal(found[:, 0], logits.argmax(dim=1))
    assert torch.equal(logits.gather(1, found).sort(descending=True).values, logits.topk(k, dim=1).values)
    assert all(len(set(row)) == k for row in found.tolist())
