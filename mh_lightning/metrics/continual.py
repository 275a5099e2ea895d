"""Continual metrics as torchmetrics classes over predictions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from mh_lightning.errors import UserError
from mh_lightning.metrics import functional as MF

TOP_K = 5  # of the metrics that are named after it, ..._top5


class AccuracyMatrix(Metric):
    """Accuracy on every task after every task.

    `update` counts the predictions of an evaluation that took place after `after_task`; states are sums, so batches
    may come in any order and from any rank. Tasks are counted from 0.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, the leading tasks that evaluations cover, by default all.
        top_k: a sample counts as correct if its class is among this many predictions.

    Attributes:
        correct: (T, T) integer counts, row: after which task, column: of which task.
        total: (T, T) integer counts.

    Example:
        >>> metric = AccuracyMatrix(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), after_task=0)
        >>> metric.compute().tolist()
        [[0.5, 1.0], [nan, nan]]
        >>> top_2 = AccuracyMatrix(num_tasks=1, top_k=2)
        >>> top_2.update(torch.tensor([[2, 0], [1, 2]]), torch.tensor([0, 0]), torch.tensor([0, 0]), after_task=0)
        >>> top_2.compute().tolist()
        [[0.5]]
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, num_evaluated_tasks: int | None = None, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_tasks, self.top_k = num_tasks, top_k
        self.num_evaluated_tasks = num_tasks if num_evaluated_tasks is None else num_evaluated_tasks
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_tasks, num_tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, tasks: Tensor, after_task: int) -> None:
        """Count a batch.

        Args:
            predictions: predicted classes, (samples,), or the k most likely ones, the first first, (samples, k).
            targets: classes, (samples,).
            tasks: task of each sample, (samples,).
            after_task: the task trained last.

        Raises:
            UserError: if there are fewer predictions a sample than `top_k`.
        """
        ranked = predictions if predictions.ndim == 2 else predictions[:, None]
        if ranked.shape[1] < self.top_k:
            raise UserError(
                f"{type(self).__name__}: top_k={self.top_k} needs as many predictions a sample, got {ranked.shape[1]}."
            )
        right = (ranked[:, : self.top_k] == targets[:, None]).any(dim=1)
        self.correct[after_task] += torch.bincount(tasks[right], minlength=self.num_tasks)
        self.total[after_task] += torch.bincount(tasks, minlength=self.num_tasks)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = super()._wrap_compute(compute)
        if type(self) is not AccuracyMatrix:
            return wrapped
        # torchmetrics makes a scalar of a single entry, but one task still has a matrix
        return lambda: wrapped().reshape(self.num_tasks, self.num_tasks)

    def compute(self) -> Tensor:
        """(T, T) accuracies in [0, 1]; NaN where nothing was evaluated yet."""
        return self.correct.double() / self.total

    def _seen(self) -> tuple[Tensor, Tensor]:
        """The accuracies (t, v) and the test samples (v,) after t tasks: v = t, if not fewer are evaluated at all."""
        trained = int((self.total.sum(dim=1) > 0).sum())
        seen = min(trained, self.num_evaluated_tasks)
        if trained == 0 or not (self.total[:trained, :seen] > 0).all():
            raise UserError(
                f"{type(self).__name__}: evaluations must cover all tasks, those to come included, after each in turn."
            )
        return AccuracyMatrix.compute(self)[:trained, :seen], self.total[trained - 1, :seen]


class AverageAccuracy(AccuracyMatrix):
    """Mean accuracy over the tasks seen; see `functional.average_accuracy`.

    Example:
        >>> metric = AverageAccuracy(num_tasks=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 0]), after_task=0)
        >>> metric.compute().item()
        0.5
    """

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        return MF.average_accuracy(self._seen()[0])


class Forgetting(AccuracyMatrix):
    """Accuracy lost since each task's best; see `functional.forgetting`."""

    def compute(self) -> Tensor:
        """A fraction in [-1, 1]."""
        return MF.forgetting(self._seen()[0])


class BackwardTransfer(AccuracyMatrix):
    """Change of each task's accuracy since it was learnt; see `functional.backward_transfer`.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        clip: report at least 0.
    """

    def __init__(
        self, num_tasks: int, num_evaluated_tasks: int | None = None, clip: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_tasks, num_evaluated_tasks, **kwargs)
        self.clip = clip

    def compute(self) -> Tensor:
        """A fraction in [-1, 1]."""
        return MF.backward_transfer(self._seen()[0], self.clip)


class ForwardTransfer(AccuracyMatrix):
    """Accuracy on tasks before they are learnt; see `functional.forward_transfer`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        return MF.forward_transfer(self._seen()[0])


class LastAccuracy(AccuracyMatrix):
    """Accuracy over the test samples of all classes seen; see `functional.last_accuracy`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        return MF.last_accuracy(*self._seen())


class LastAccuracyOld(AccuracyMatrix):
    """Accuracy over the test samples of all tasks before the last; see `functional.last_accuracy_old`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1], NaN after the first task."""
        return MF.last_accuracy_old(*self._seen())


class LastAccuracyNew(AccuracyMatrix):
    """Accuracy on the last task; see `functional.last_accuracy_new`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1], NaN after a task that is not evaluated."""
        return MF.last_accuracy_new(self._seen()[0])


class IncrementalAccuracy(AccuracyMatrix):
    """Mean of the last accuracy over tasks; see `functional.incremental_accuracy`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        return MF.incremental_accuracy(*self._seen())


def continual_metrics(
    num_tasks: int, num_evaluated_tasks: int | None = None, with_top5: bool = False
) -> MetricCollection:
    """All of them, under the names of results.json, sharing one state, and those over top-5 predictions another.

    The five are among all classes, seen or not, as the one prediction is. So top-5 accuracy says little where at most
    five classes are seen: it is 1 with every method that ranks classes to come last.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        with_top5: last and incremental accuracy over top-5 predictions too; `update` then takes (samples, 5).

    Example:
        >>> sorted(continual_metrics(2))[:3]
        ['accuracy_matrix', 'average_accuracy', 'backward_transfer']
        >>> sorted(set(continual_metrics(2, with_top5=True)) - set(continual_metrics(2)))
        ['incremental_accuracy_top5', 'last_accuracy_top5']
    """
    members: dict[str, Metric | MetricCollection] = {
        "accuracy_matrix": AccuracyMatrix(num_tasks, num_evaluated_tasks),
        "average_accuracy": AverageAccuracy(num_tasks, num_evaluated_tasks),
        "forgetting": Forgetting(num_tasks, num_evaluated_tasks),
        "backward_transfer": BackwardTransfer(num_tasks, num_evaluated_tasks),
        "backward_transfer_clipped": BackwardTransfer(num_tasks, num_evaluated_tasks, clip=True),
        "forward_transfer": ForwardTransfer(num_tasks, num_evaluated_tasks),
        "last_accuracy": LastAccuracy(num_tasks, num_evaluated_tasks),
        "last_accuracy_old": LastAccuracyOld(num_tasks, num_evaluated_tasks),
        "last_accuracy_new": LastAccuracyNew(num_tasks, num_evaluated_tasks),
        "incremental_accuracy": IncrementalAccuracy(num_tasks, num_evaluated_tasks),
    }
    top5: dict[str, Metric | MetricCollection] = {
        "last_accuracy_top5": LastAccuracy(num_tasks, num_evaluated_tasks, top_k=TOP_K),
        "incremental_accuracy_top5": IncrementalAccuracy(num_tasks, num_evaluated_tasks, top_k=TOP_K),
    }
    if not with_top5:
        return MetricCollection(members, compute_groups=[list(members)])
    return MetricCollection(members | top5, compute_groups=[list(members), list(top5)])
