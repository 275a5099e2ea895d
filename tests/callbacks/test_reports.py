"""Accuracies after each task, and the closing table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mh_lightning.callbacks.reports import accuracy_by_task, results_table
from mh_lightning.metrics import AccuracyMatrix
from mh_lightning.metrics.functional import most_likely
from tests.metrics.evaluations import outputs

# three tasks with 10, 30 and 20 test samples
COUNTS = {
    "correct": torch.tensor([[9, 3, 0], [6, 21, 1], [5, 15, 16]]),
    "total": torch.tensor([[10, 30, 20]] * 3),
    "correct_top5": torch.tensor([[10, 3, 0], [9, 27, 2], [8, 22, 18]]),
}
GROUPS = [[3, 1], [0], [4, 2, 5]]


def test_by_hand() -> None:
    first, *others = accuracy_by_task(COUNTS, 3, GROUPS)
    assert first == {"task": 1, "classes_seen": 2, "accuracy": 0.9, "accuracy_new": 0.9, "accuracy_top5": 1.0}
    expected = [
        {"task": 2, "classes_seen": 3, "accuracy": 27 / 40, "accuracy_old": 0.6, "accuracy_new": 0.7,
         "accuracy_top5": 0.9},
        {"task": 3, "classes_seen": 6, "accuracy": 36 / 60, "accuracy_old": 0.5, "accuracy_new": 0.8,
         "accuracy_top5": 48 / 60},
    ]  # fmt: skip
    assert [list(row) for row in others] == [list(row) for row in expected]
    assert others == [pytest.approx(row, abs=1e-12) for row in expected]


def test_tasks_that_are_not_evaluated_or_not_trained_yet() -> None:
    counts = {"correct": COUNTS["correct"].clone(), "total": COUNTS["total"].clone()}
    for count in counts.values():
        count[2] = 0  # the run ended after two tasks
        count[:, 1:] = 0  # and only the first has validation data
    assert accuracy_by_task(counts, 1, GROUPS) == [
        {"task": 1, "classes_seen": 2, "accuracy": 0.9, "accuracy_new": 0.9},
        {"task": 2, "classes_seen": 3, "accuracy": 0.6, "accuracy_old": 0.6},
    ]


def test_classes_that_come_again_in_another_domain() -> None:
    rows = accuracy_by_task(COUNTS, 3, [[0, 1], [2], [1, 0]])
    assert [row["classes_seen"] for row in rows] == [2, 3, 3]


def test_spaced_evaluations_by_hand() -> None:
    counts = {name: count[[1, 2]] for name, count in COUNTS.items()}  # after the second and the third task
    rows = accuracy_by_task(counts, 3, GROUPS, evaluated_after=[2, 3])
    assert rows == accuracy_by_task(COUNTS, 3, GROUPS)[1:]
    last = {name: count[[2]] for name, count in COUNTS.items()}
    assert accuracy_by_task(last, 3, GROUPS, evaluated_after=[3]) == rows[1:]


def test_long_tables_are_shortened() -> None:
    after = list(range(100, 10001, 100))
    results = {"accuracy_matrix": [[task / 20000, 1.0] for task in after], "evaluated_after": after,
               "by_task": [{"task": task, "classes_seen": 4, "accuracy": task / 20000} for task in after]}  # fmt: skip
    lines = results_table(results).splitlines()
    assert len(lines) < 100 and lines.count("... (60 more)") == 2
    assert {"after task 100      0.5  100.0", "after task 10000   50.0  100.0"} < set(lines)
    assert lines[-1] == "after task 10000   50.0        4"
    assert {len(line) for line in lines if "task" in line} == {30, 32}


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_against_raw_predictions(num_tasks: int, seed: int) -> None:
    top1, top5 = AccuracyMatrix(num_tasks), AccuracyMatrix(num_tasks, top_k=5)
    expected = []
    for after in range(num_tasks):
        logits, targets, tasks = outputs(num_tasks, after, seed)
        for metric in (top1, top5):
            metric.update(most_likely(logits, 5), targets, tasks, after)
        samples = list(zip(logits.tolist(), targets.tolist(), tasks.tolist(), strict=True))
        # how many classes come before the right one
        places = [(sum(value > scores[target] for value in scores), task) for scores, target, task in samples]
        row = {
            "task": after + 1,
            "classes_seen": 2 * (after + 1),
            "accuracy": share([place == 0 for place, task in places if task <= after]),
            "accuracy_new": share([place == 0 for place, task in places if task == after]),
            "accuracy_top5": share([place < 5 for place, task in places if task <= after]),
        }
        if after > 0:
            row["accuracy_old"] = share([place == 0 for place, task in places if task < after])
        expected.append(row)
    counts: dict[str, Tensor] = {"correct": top1.correct, "total": top1.total, "correct_top5": top5.correct}
    found = accuracy_by_task(counts, num_tasks, [[2 * task, 2 * task + 1] for task in range(num_tasks)])
    assert found == [pytest.approx(row, abs=1e-12) for row in expected]


def test_table_in_full() -> None:
    matrix = (COUNTS["correct"] / COUNTS["total"].double()).tolist()
    results = {"accuracy_matrix": matrix, "average_accuracy": 0.6,
               "incremental_accuracy_top5": 0.9, "seconds": 12.0,
               "by_task": accuracy_by_task(COUNTS, 3, GROUPS)}  # fmt: skip
    assert results_table(results).splitlines() == [
        "",
        "Accuracy (%)  task 1 task 2 task 3",
        "after task 1    90.0   10.0    0.0",
        "after task 2    60.0   70.0    5.0",
        "after task 3    50.0   50.0   80.0",
        "",
        "average accuracy              0.600",
        "incremental accuracy top5     0.900",
        "seconds                      12.000",
        "",
        "Accuracy (%)    seen    old    new   top5  classes",
        "after task 1    90.0          90.0  100.0        2",
        "after task 2    67.5   60.0   70.0   90.0        3",
        "after task 3    60.0   50.0   80.0   80.0        6",
    ]


def test_table_without_top5() -> None:
    rows = accuracy_by_task({name: COUNTS[name] for name in ("correct", "total")}, 3, GROUPS)
    lines = results_table({"accuracy_matrix": [[1.0]], "by_task": rows}).splitlines()
    assert lines[-4:-2] == [
        "Accuracy (%)    seen    old    new  classes",
        "after task 1    90.0          90.0        2",
    ]
