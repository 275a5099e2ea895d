"""What the files and the screen say of a run: accuracies after each task, and the closing table."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mh_lightning.metrics import functional
from mh_lightning.metrics.continual import RESERVED

MOST_LINES = 40  # of a printed table
LISTED = (
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "all_pairs_backward_transfer",
    "all_pairs_forward_transfer",
    "last_accuracy",
    "incremental_accuracy",
    "task_incremental_accuracy",
    "last_accuracy_top5",
    "incremental_accuracy_top5",
    "expected_calibration_error",
    "negative_log_likelihood",
    "seconds",
)
COLUMNS = {"accuracy": "seen", "accuracy_old": "old", "accuracy_new": "new", "accuracy_top5": "top5"}


def defined(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers without NaN, which JSON does not have.

    Args:
        values: tensors of one element.

    Example:
        >>> import torch
        >>> defined({"last_accuracy_new": torch.tensor(0.5), "last_accuracy_old": torch.tensor(torch.nan)})
        {'last_accuracy_new': 0.5}
    """
    return {name: float(value) for name, value in values.items() if not value.isnan()}


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to count - 1, the first and the last among them.

    Example:
        >>> evenly_spaced(3, most=4), evenly_spaced(100, most=4)
        ([0, 1, 2], [0, 33, 66, 99])
    """
    return list(range(count)) if count <= most else [place * (count - 1) // (most - 1) for place in range(most)]


def shortened(lines: list[str]) -> list[str]:
    """The first and the last lines of a long table.

    Example:
        >>> shortened([str(line) for line in range(50)])[19:22]
        ['19', '... (10 more)', '30']
    """
    half = MOST_LINES // 2
    hidden = len(lines) - 2 * half
    return lines if hidden <= 0 else [*lines[:half], f"... ({hidden} more)", *lines[-half:]]


def accuracy_by_task(
    counts: Mapping[str, Tensor],
    num_evaluated_tasks: int,
    class_groups: Sequence[Sequence[int]],
    evaluated_after: Sequence[int] | None = None,
) -> list[dict[str, float]]:
    """The course of a run, as `by_task` of results.json: an entry for each evaluation, by default one a task.

    ``accuracy`` is that over the test samples of all tasks seen, ``accuracy_old`` of the earlier ones, ``accuracy_new``
    of the last one, and ``accuracy_top5`` again of all, with the class among the five largest logits. What there are no
    samples of is left out, such as the earlier tasks in the first entry.

    Args:
        counts: (E, T) each, as in `AccuracyMatrix`: "correct", "total", and "correct_top5" where it is counted.
        num_evaluated_tasks: V, the leading tasks that evaluations cover.
        class_groups: the classes of each task.
        evaluated_after: numbers of tasks trained at the evaluations, by default 1 to T.

    Example:
        >>> import torch
        >>> counts = {"correct": torch.tensor([[4, 0], [1, 6]]), "total": torch.tensor([[4, 6], [4, 6]])}
        >>> for row in accuracy_by_task(counts, 2, [[0], [2, 1]]):
        ...     print(row)
        {'task': 1, 'classes_seen': 1, 'accuracy': 1.0, 'accuracy_new': 1.0}
        {'task': 2, 'classes_seen': 3, 'accuracy': 0.7, 'accuracy_old': 0.25, 'accuracy_new': 1.0}
    """
    evaluations = int((counts["total"].sum(dim=1) > 0).sum())
    trained = [*range(1, evaluations + 1)] if evaluated_after is None else list(evaluated_after[:evaluations])
    accuracies = {name: counts[name].double() / counts["total"] for name in counts if name != "total"}
    rows, classes = [], set[int]()
    for row, (before, task) in enumerate(itertools.pairwise([0, *trained])):
        seen, after = min(task, num_evaluated_tasks), trained[: row + 1]
        samples = counts["total"][row, :seen]
        matrix = accuracies["correct"][: row + 1, :seen]
        values = {
            "accuracy": functional.last_accuracy(matrix, samples),
            "accuracy_old": functional.last_accuracy_old(matrix, samples, after),
            "accuracy_new": functional.last_accuracy_new(matrix, after),
        }
        if "correct_top5" in accuracies:
            values["accuracy_top5"] = functional.last_accuracy(accuracies["correct_top5"][: row + 1, :seen], samples)
        classes.update(*class_groups[before:task])
        rows.append({"task": task, "classes_seen": len(classes), **defined(values)})
    return rows


def results_table(results: dict[str, Any]) -> str:
    """A readable summary of results.json.

    Example:
        >>> print(results_table({"accuracy_matrix": [[1.0, 0.0], [0.5, 0.9]], "average_accuracy": 0.7}))
        <BLANKLINE>
        Accuracy (%)  task 1 task 2
        after task 1   100.0    0.0
        after task 2    50.0   90.0
        <BLANKLINE>
        average accuracy              0.700

    With `by_task`, a second table follows: accuracy on the tasks seen, the earlier ones, and the last one. If a run
    that goes on has measured the tasks of before, a line has them. Of long tables only the first and the last lines are
    shown.
    """
    matrix = results["accuracy_matrix"]
    after = results.get("evaluated_after", range(1, len(matrix) + 1))
    width = max(13, len(f"after task {after[-1]}"))
    shown = range(min(len(matrix[0]), 12))
    lines = ["", f"{'Accuracy (%)':<{width}}" + "".join(f" {f'task {task + 1}':>6}" for task in shown)]
    lines += shortened([
        f"{f'after task {task}':<{width}}" + "".join(f" {100 * values[column]:6.1f}" for column in shown)
        for task, values in zip(after, matrix, strict=True)
    ])  # fmt: skip
    measured = results.get("parent", {}).get("accuracy_matrix_of_both", matrix)[-1][: -len(matrix[0])]
    if any(value is not None for value in measured):
        now = " ".join("   -  " if value is None else f"{100 * value:6.1f}" for value in measured)
        lines += ["", f"earlier tasks now {now}"]
    lines.append("")
    own = [name for name, value in results.items() if name not in RESERVED and isinstance(value, float)]
    values = {name.replace("_", " "): results[name] for name in (*LISTED, *own) if name in results}
    if "validation" in results:
        values["average accuracy, validation"] = results["validation"]["average_accuracy"]
    lines += [f"{label}{value:{35 - len(label)}.3f}" for label, value in values.items()]
    by_task = results.get("by_task", [])
    columns = {name: title for name, title in COLUMNS.items() if any(name in row for row in by_task)}
    if by_task:
        lines += [
            "",
            f"{'Accuracy (%)':<{width}}" + "".join(f" {title:>6}" for title in columns.values()) + "  classes",
        ]
    rows = []
    for row in by_task:
        title = f"after task {row['task']}"
        cells = "".join(f" {100 * row[name]:6.1f}" if name in row else 7 * " " for name in columns)
        rows.append(f"{title:<{width}}{cells} {row['classes_seen']:8}")
    return "\n".join(lines + shortened(rows))


def with_parent(
    before: Sequence[Sequence[float | None]] | None,
    matrix: Sequence[Sequence[float]],
    earlier: Sequence[Sequence[float | None]] = (),
) -> list[list[float | None]]:
    """The accuracy matrix of a run, (E, T), below and beside that of the run that it goes on with; None where nothing
    was measured.

    Args:
        before: accuracies of the earlier tasks, then.
        matrix: of the tasks of this run.
        earlier: of the earlier tasks, at the evaluations of this run, where they were measured.

    Example:
        >>> with_parent([[1.0]], [[0.5, 0.0], [0.5, 0.5]])
        [[1.0, None, None], [None, 0.5, 0.0], [None, 0.5, 0.5]]
        >>> with_parent([[1.0]], [[0.5, 0.0], [0.5, 0.5]], [[0.9], [0.8]])
        [[1.0, None, None], [0.9, 0.5, 0.0], [0.8, 0.5, 0.5]]
    """
    before = before or []
    old = len([*before, *earlier, []][0])
    below: Sequence[Sequence[float | None]] = earlier or [[None] * old] * len(matrix)
    rows = [[*row, *[None] * len(matrix[0])] for row in before]
    return rows + [[*known, *row] for known, row in zip(below, matrix, strict=True)]
