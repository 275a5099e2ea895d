"""Accuracy where the task of each sample is told."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mh_lightning.metrics.continual import ContinualMetric


class TaskIncrementalAccuracy(ContinualMetric):
    """Average accuracy over the tasks seen, of predictions among the classes of each sample's own task.

    It is the accuracy of the task-incremental protocol; where all tasks have the same classes, it is the average
    accuracy.

    Source: van de Ven, Tuytelaars, Tolias, "Three types of incremental learning", Nature Machine Intelligence 2022.

    Args:
        class_groups: the classes of each of the T tasks.
        num_classes: C.
        num_evaluated_tasks: V, the leading tasks that evaluations cover, by default all.
        every_n_tasks: evaluations take place after every so many tasks and after the last.

    Example:
        >>> metric = TaskIncrementalAccuracy([[0, 1], [2, 3]], num_classes=4)
        >>> logits = torch.tensor([[1.0, 2.0, 9.0, 0.0], [9.0, 0.0, 1.0, 2.0]])
        >>> metric.update(logits, torch.tensor([1, 2]), torch.tensor([0, 1]), after_task=0)
        >>> metric.update(logits, torch.tensor([1, 2]), torch.tensor([0, 1]), after_task=1)
        >>> metric.compute().item()
        0.5
    """

    among: Tensor

    def __init__(
        self,
        class_groups: Sequence[Sequence[int]],
        num_classes: int,
        num_evaluated_tasks: int | None = None,
        every_n_tasks: int = 1,
    ) -> None:
        super().__init__("average_accuracy", len(class_groups), num_evaluated_tasks, every_n_tasks=every_n_tasks)
        among = torch.zeros(len(class_groups), num_classes, dtype=torch.bool)
        for task, group in enumerate(class_groups):
            among[task, list(group)] = True
        self.register_buffer("among", among, persistent=False)

    def update(self, logits: Tensor, targets: Tensor, tasks: Tensor, after_task: int) -> None:
        """Count a batch.

        Args:
            logits: (samples, C).
            targets: classes, (samples,).
            tasks: task of each sample, (samples,).
            after_task: the task trained last, -1 before the first.
        """
        predictions = logits.masked_fill(~self.among[tasks], -torch.inf).argmax(dim=1)
        super().update(predictions, targets, tasks, after_task)
