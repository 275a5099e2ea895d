"""Continual metrics as torchmetrics classes over predictions: a matrix, and a table of what follows from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from mh_lightning.errors import UserError
from mh_lightning.metrics import functional
from mh_lightning.metrics.calibration import CALIBRATION

TOP_K = 5  # of the metrics that are named after it, ..._top5


@dataclass(frozen=True)
class Evaluations:
    """What a metric is computed from: the evaluations of a stream so far.

    Attributes:
        matrix: (e, v) accuracies in [0, 1] on each of the v tasks seen, after each of e evaluations.
        samples: (v,) test samples of each task.
        after: the number of tasks trained at each evaluation; 1 to e unless evaluation is spaced.
        untrained: (v,) accuracies before the first task, NaN where they were not evaluated.
    """

    matrix: Tensor
    samples: Tensor
    after: list[int]
    untrained: Tensor


Function = Callable[[Evaluations], Tensor | float]  # a metric


def _forward_transfer(seen: Evaluations) -> Tensor:
    known = functional.forward_transfer(seen.matrix, seen.untrained, seen.after)
    return known.new_full((), torch.nan) if seen.untrained.isnan().any() else known


METRICS: dict[str, Function] = {
    "average_accuracy": lambda seen: functional.average_accuracy(seen.matrix),
    "forgetting": lambda seen: functional.forgetting(seen.matrix, seen.after),
    "backward_transfer": lambda seen: functional.backward_transfer(seen.matrix, seen.after),
    "forward_transfer": _forward_transfer,
    "all_pairs_backward_transfer": lambda seen: functional.all_pairs_backward_transfer(seen.matrix, False, seen.after),
    "all_pairs_backward_transfer_clipped": lambda seen: functional.all_pairs_backward_transfer(
        seen.matrix, True, seen.after
    ),
    "all_pairs_forward_transfer": lambda seen: functional.all_pairs_forward_transfer(seen.matrix, seen.after),
    "last_accuracy": lambda seen: functional.last_accuracy(seen.matrix, seen.samples),
    "last_accuracy_old": lambda seen: functional.last_accuracy_old(seen.matrix, seen.samples, seen.after),
    "last_accuracy_new": lambda seen: functional.last_accuracy_new(seen.matrix, seen.after),
    "incremental_accuracy": lambda seen: functional.incremental_accuracy(seen.matrix, seen.samples, seen.after),
}
OVER_TOP_K = ("last_accuracy", "incremental_accuracy")


class AccuracyMatrix(Metric):
    """Accuracy on every task after every task.

    `update` counts the predictions of an evaluation that took place after `after_task`; states are sums, so batches
    may come in any order and from any rank. Tasks are counted from 0.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, the leading tasks that evaluations cover, by default all.
        top_k: a sample counts as correct if its class is among this many predictions.
        every_n_tasks: evaluations take place after every so many tasks and after the last, E of them.

    Attributes:
        correct: (E, T) integer counts, row: after which task, column: of which task.
        total: (E, T) integer counts.
        untrained_correct: (T,) integer counts of the model before the first task.
        untrained_total: (T,) integer counts, 0 where it was not evaluated.
        evaluated_after: numbers of tasks trained at the evaluations, E of them, T the last.

    Example:
        >>> metric = AccuracyMatrix(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), after_task=0)
        >>> metric.compute().tolist()
        [[0.5, 1.0], [nan, nan]]
        >>> top_2 = AccuracyMatrix(num_tasks=1, top_k=2)
        >>> top_2.update(torch.tensor([[2, 0], [1, 2]]), torch.tensor([0, 0]), torch.tensor([0, 0]), after_task=0)
        >>> top_2.compute().tolist()
        [[0.5]]
        >>> AccuracyMatrix(num_tasks=5, every_n_tasks=2).evaluated_after
        [2, 4, 5]
    """

    full_state_update = False
    correct: Tensor
    total: Tensor
    untrained_correct: Tensor
    untrained_total: Tensor

    def __init__(
        self,
        num_tasks: int,
        num_evaluated_tasks: int | None = None,
        top_k: int = 1,
        every_n_tasks: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_tasks, self.top_k, self.every_n_tasks = num_tasks, top_k, every_n_tasks
        self.evaluated_after = [*range(every_n_tasks, num_tasks, every_n_tasks), num_tasks]
        self.num_evaluated_tasks = num_tasks if num_evaluated_tasks is None else num_evaluated_tasks
        for name in ("correct", "total"):
            # one zero spread out, until the first update: of metrics that share a state, one alone needs the memory
            nothing = torch.zeros((), dtype=torch.long).expand(len(self.evaluated_after), num_tasks)
            self.add_state(name, nothing, dist_reduce_fx="sum")
            self.add_state(f"untrained_{name}", torch.zeros(num_tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, tasks: Tensor, after_task: int) -> None:
        """Count a batch.

        Args:
            predictions: predicted classes, (samples,), or the k most likely ones, the first first, (samples, k).
            targets: classes, (samples,).
            tasks: task of each sample, (samples,).
            after_task: the task trained last, -1 before the first.

        Raises:
            UserError: if there are fewer predictions a sample than `top_k`, or no evaluation is due after this task.
        """
        row = after_task // self.every_n_tasks
        if after_task >= 0 and after_task + 1 != self.evaluated_after[row]:
            raise UserError(
                f"{self.name}: every_n_tasks={self.every_n_tasks} leaves out an evaluation after task "
                f"{after_task + 1} of {self.num_tasks}."
            )
        ranked = predictions if predictions.ndim == 2 else predictions[:, None]
        if ranked.shape[1] < self.top_k:
            raise UserError(
                f"{self.name}: top_k={self.top_k} needs as many predictions a sample, got {ranked.shape[1]}."
            )
        self._make_room()
        right = (ranked[:, : self.top_k] == targets[:, None]).any(dim=1)
        correct, total = (torch.bincount(part, minlength=self.num_tasks) for part in (tasks[right], tasks))
        if after_task < 0:
            self.untrained_correct += correct
            self.untrained_total += total
        else:
            self.correct[row] += correct
            self.total[row] += total

    def go_on_from(self, correct: Tensor, total: Tensor) -> None:
        """Take up counts of the first evaluations, (e, T) each."""
        self._make_room()
        self.correct[: len(correct)] = correct.to(self.correct)
        self.total[: len(total)] = total.to(self.total)
        self._update_count = 1

    def go_on_from_untrained(self, correct: Tensor, total: Tensor) -> None:
        """Take up counts of the evaluation before the first task, (T,) each."""
        self.untrained_correct.copy_(correct)
        self.untrained_total.copy_(total)

    def untrained(self) -> Tensor:
        """(T,) accuracies before the first task, NaN where they were not evaluated."""
        return self.untrained_correct.double() / self.untrained_total

    def _make_room(self) -> None:
        if not self.correct.is_contiguous():
            self.correct, self.total = self.correct.contiguous(), self.total.contiguous()

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = super()._wrap_compute(compute)
        if type(self) is not AccuracyMatrix:
            return wrapped
        # torchmetrics makes a scalar of a single entry, but one task still has a matrix
        return lambda: wrapped().reshape(len(self.evaluated_after), self.num_tasks)

    def compute(self) -> Tensor:
        """(E, T) accuracies in [0, 1]; NaN where nothing was evaluated yet."""
        return self.correct.double() / self.total

    @property
    def tasks_trained(self) -> list[int]:
        """Numbers of tasks trained at the evaluations so far."""
        return self.evaluated_after[: int((self.total.sum(dim=1) > 0).sum())]

    def evaluations(self) -> Evaluations:
        """The evaluations so far, of the tasks seen: v = t, if not fewer are evaluated at all.

        Raises:
            UserError: if there is none, or one does not cover all tasks.
        """
        after = self.tasks_trained
        rows, seen = len(after), min(after[-1] if after else 0, self.num_evaluated_tasks)
        if not after or not (self.total[:rows, :seen] > 0).all():
            raise UserError(
                f"{self.name}: evaluations must cover all tasks, those to come included, after each in turn."
            )
        matrix = self.correct[:rows, :seen].double() / self.total[:rows, :seen]
        return Evaluations(matrix, self.total[rows - 1, :seen], after, self.untrained()[:seen])

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__


class ContinualMetric(AccuracyMatrix):
    """A number that follows from the accuracy matrix.

    Args:
        metric: the name of one in `METRICS`, or a function of `Evaluations`.
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        options: of `AccuracyMatrix`.

    Raises:
        UserError: if there is no such metric.

    Example:
        >>> def worst_task(seen: Evaluations) -> Tensor:
        ...     return seen.matrix[-1].min()
        >>> metrics = [ContinualMetric(kind, num_tasks=2) for kind in ("average_accuracy", worst_task)]
        >>> for metric in metrics:
        ...     metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]), after_task=0)
        ...     metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]), after_task=1)
        >>> [metric.compute().item() for metric in metrics]
        [0.75, 0.5]
    """

    def __init__(
        self, metric: str | Function, num_tasks: int, num_evaluated_tasks: int | None = None, **options: Any
    ) -> None:
        super().__init__(num_tasks, num_evaluated_tasks, **options)
        self.metric = metric
        if isinstance(metric, str) and metric not in METRICS:
            raise UserError(f"metric={metric!r} is none of {', '.join(METRICS)}.")

    def compute(self) -> Tensor:
        """A scalar; NaN if none of it was measured."""
        function = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
        seen = self.evaluations()
        value = torch.as_tensor(function(seen), dtype=seen.matrix.dtype, device=seen.matrix.device)
        if value.numel() != 1:
            raise UserError(f"{self.name} must give one number, got a tensor of shape {tuple(value.shape)}.")
        return value.reshape(())

    @property
    def name(self) -> str:
        """That of the metric or the function."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", repr(self.metric))


def continual_metrics(
    num_tasks: int,
    num_evaluated_tasks: int | None = None,
    with_top5: bool = False,
    every_n_tasks: int = 1,
    extra: Mapping[str, Function] | None = None,
) -> MetricCollection:
    """The accuracy matrix and all of `METRICS`, under the names of results.json, sharing one state, and those over
    top-5 predictions another.

    The five are among all classes, seen or not, as the one prediction is. So top-5 accuracy says little where at most
    five classes are seen: it is 1 with every method that ranks classes to come last.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        with_top5: last and incremental accuracy over top-5 predictions too; `update` then takes (samples, 5).
        every_n_tasks: evaluations take place after every so many tasks and after the last.
        extra: more metrics by name, functions of `Evaluations`.

    Raises:
        UserError: if an extra one has the name of another.

    Example:
        >>> sorted(continual_metrics(2))[:3]
        ['accuracy_matrix', 'all_pairs_backward_transfer', 'all_pairs_backward_transfer_clipped']
        >>> sorted(set(continual_metrics(2, with_top5=True)) - set(continual_metrics(2)))
        ['incremental_accuracy_top5', 'last_accuracy_top5']
        >>> "worst" in continual_metrics(2, extra={"worst": lambda seen: seen.matrix[-1].min()})
        True
    """

    def make(metric: str | Function, top_k: int = 1) -> ContinualMetric:
        return ContinualMetric(metric, num_tasks, num_evaluated_tasks, top_k=top_k, every_n_tasks=every_n_tasks)

    members: dict[str, Metric | MetricCollection] = {
        "accuracy_matrix": AccuracyMatrix(num_tasks, num_evaluated_tasks, every_n_tasks=every_n_tasks),
        **{name: make(name) for name in METRICS},
    }
    top5: dict[str, Metric | MetricCollection] = {
        f"{name}_top5": make(name, TOP_K) for name in (OVER_TOP_K if with_top5 else ())
    }
    for name, function in (extra or {}).items():
        if name in RESERVED or not name.isidentifier():
            raise UserError(f"extra: {name!r} cannot name a metric; take another name of letters, digits and _.")
        members[name] = make(function)
    return MetricCollection(members | top5, compute_groups=[list(group) for group in (members, top5) if group])


# what results.json holds besides, and what comes first in the names of curves
RESERVED = {
    "accuracy_matrix", *METRICS, *CALIBRATION, *(f"{name}_top5" for name in OVER_TOP_K), "by_task", "cost",
    "evaluated_after", "num_tasks", "parameters", "seconds", "seed", "task_incremental_accuracy",
    "task_incremental_accuracy_matrix", "tasks_trained", "test", "untrained_accuracy", "validation",
}  # fmt: skip
