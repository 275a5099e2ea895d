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
                f"{type(self).__name__}: every_n_tasks={self.every_n_tasks} leaves out an evaluation after task "
                f"{after_task + 1} of {self.num_tasks}."
            )
        ranked = predictions if predictions.ndim == 2 else predictions[:, None]
        if ranked.shape[1] < self.top_k:
            raise UserError(
                f"{type(self).__name__}: top_k={self.top_k} needs as many predictions a sample, got {ranked.shape[1]}."
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

    def _seen(self) -> tuple[Tensor, Tensor, list[int]]:
        """The accuracies (e, v) after e evaluations, the test samples (v,), and the tasks trained at each evaluation,
        t at the last: v = t, if not fewer are evaluated at all.
        """
        after = self.tasks_trained
        rows, seen = len(after), min(after[-1] if after else 0, self.num_evaluated_tasks)
        if not after or not (self.total[:rows, :seen] > 0).all():
            raise UserError(
                f"{type(self).__name__}: evaluations must cover all tasks, those to come included, after each in turn."
            )
        return self.correct[:rows, :seen].double() / self.total[:rows, :seen], self.total[rows - 1, :seen], after


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
        matrix, _, _ = self._seen()
        return MF.average_accuracy(matrix)


class Forgetting(AccuracyMatrix):
    """Accuracy lost since each task's best; see `functional.forgetting`."""

    def compute(self) -> Tensor:
        """A fraction in [-1, 1], NaN if none of it was measured."""
        matrix, _, after = self._seen()
        return MF.forgetting(matrix, after)


class BackwardTransfer(AccuracyMatrix):
    """Change of each task's accuracy since it was learnt; see `functional.backward_transfer`."""

    def compute(self) -> Tensor:
        """A fraction in [-1, 1], NaN if none of it was measured."""
        matrix, _, after = self._seen()
        return MF.backward_transfer(matrix, after)


class ForwardTransfer(AccuracyMatrix):
    """What is gained on each task before it is learnt; see `functional.forward_transfer`.

    Example:
        >>> metric = ForwardTransfer(num_tasks=2)
        >>> for after_task, second in ((-1, 0), (0, 3), (1, 3)):
        ...     metric.update(torch.tensor([0, second]), torch.tensor([0, 3]), torch.tensor([0, 1]), after_task)
        >>> metric.compute().item()
        1.0
    """

    def compute(self) -> Tensor:
        """A fraction in [-1, 1], NaN if none of it was measured, or the untrained model was not evaluated."""
        matrix, _, after = self._seen()
        untrained = self.untrained()[: matrix.shape[1]]
        known = MF.forward_transfer(matrix, untrained, after)
        return known.new_full((), torch.nan) if untrained.isnan().any() else known


class AllPairsBackwardTransfer(AccuracyMatrix):
    """The same as `BackwardTransfer` at all later times; see `functional.all_pairs_backward_transfer`.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        clip: report at least 0.
        options: of `AccuracyMatrix`.
    """

    def __init__(
        self, num_tasks: int, num_evaluated_tasks: int | None = None, clip: bool = False, **options: Any
    ) -> None:
        super().__init__(num_tasks, num_evaluated_tasks, **options)
        self.clip = clip

    def compute(self) -> Tensor:
        """A fraction in [-1, 1], NaN if none of it was measured."""
        matrix, _, after = self._seen()
        return MF.all_pairs_backward_transfer(matrix, self.clip, after)


class AllPairsForwardTransfer(AccuracyMatrix):
    """Accuracy on tasks before they are learnt; see `functional.all_pairs_forward_transfer`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1], NaN if none of it was measured."""
        matrix, _, after = self._seen()
        return MF.all_pairs_forward_transfer(matrix, after)


class LastAccuracy(AccuracyMatrix):
    """Accuracy over the test samples of all classes seen; see `functional.last_accuracy`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        matrix, samples, _ = self._seen()
        return MF.last_accuracy(matrix, samples)


class LastAccuracyOld(AccuracyMatrix):
    """Accuracy over the test samples of all tasks before the last; see `functional.last_accuracy_old`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1], NaN after the first task."""
        matrix, samples, after = self._seen()
        return MF.last_accuracy_old(matrix, samples, after)


class LastAccuracyNew(AccuracyMatrix):
    """Accuracy on the last task; see `functional.last_accuracy_new`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1], NaN after a task that is not evaluated."""
        matrix, _, after = self._seen()
        return MF.last_accuracy_new(matrix, after)


class IncrementalAccuracy(AccuracyMatrix):
    """Mean of the last accuracy over tasks; see `functional.incremental_accuracy`."""

    def compute(self) -> Tensor:
        """A fraction in [0, 1]."""
        matrix, samples, after = self._seen()
        return MF.incremental_accuracy(matrix, samples, after)


def continual_metrics(
    num_tasks: int, num_evaluated_tasks: int | None = None, with_top5: bool = False, every_n_tasks: int = 1
) -> MetricCollection:
    """All of them, under the names of results.json, sharing one state, and those over top-5 predictions another.

    The five are among all classes, seen or not, as the one prediction is. So top-5 accuracy says little where at most
    five classes are seen: it is 1 with every method that ranks classes to come last.

    Args:
        num_tasks: T.
        num_evaluated_tasks: V, by default all.
        with_top5: last and incremental accuracy over top-5 predictions too; `update` then takes (samples, 5).
        every_n_tasks: evaluations take place after every so many tasks and after the last.

    Example:
        >>> sorted(continual_metrics(2))[:3]
        ['accuracy_matrix', 'all_pairs_backward_transfer', 'all_pairs_backward_transfer_clipped']
        >>> sorted(set(continual_metrics(2, with_top5=True)) - set(continual_metrics(2)))
        ['incremental_accuracy_top5', 'last_accuracy_top5']
    """

    def make(kind: type[AccuracyMatrix], **options: Any) -> Metric:
        return kind(num_tasks, num_evaluated_tasks, every_n_tasks=every_n_tasks, **options)

    members: dict[str, Metric | MetricCollection] = {
        "accuracy_matrix": make(AccuracyMatrix),
        "average_accuracy": make(AverageAccuracy),
        "forgetting": make(Forgetting),
        "backward_transfer": make(BackwardTransfer),
        "forward_transfer": make(ForwardTransfer),
        "all_pairs_backward_transfer": make(AllPairsBackwardTransfer),
        "all_pairs_backward_transfer_clipped": make(AllPairsBackwardTransfer, clip=True),
        "all_pairs_forward_transfer": make(AllPairsForwardTransfer),
        "last_accuracy": make(LastAccuracy),
        "last_accuracy_old": make(LastAccuracyOld),
        "last_accuracy_new": make(LastAccuracyNew),
        "incremental_accuracy": make(IncrementalAccuracy),
    }
    top5: dict[str, Metric | MetricCollection] = {
        "last_accuracy_top5": make(LastAccuracy, top_k=TOP_K),
        "incremental_accuracy_top5": make(IncrementalAccuracy, top_k=TOP_K),
    }
    if not with_top5:
        return MetricCollection(members, compute_groups=[list(members)])
    return MetricCollection(members | top5, compute_groups=[list(members), list(top5)])
