"""One head for each task, over features that they share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError, require


class TruncatedNormalLinear(nn.Linear):
    r"""Linear layer that starts from a normal distribution, cut off at two units, and a zero bias.

    Args:
        in_features: n.
        out_features: o.
        std: standard deviation, above 0, of the weights before they are cut off.

    Raises:
        UserError: if `std` is not positive.

    Source: the heads of Zhang et al., "SLCA", ICCV 2023, start so.

    Example:
        >>> TruncatedNormalLinear(8, 3)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_features: int, out_features: int, std: float = 0.02) -> None:
        require("TruncatedNormalLinear: std", std, above=0)
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.trunc_normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class TaskHeads(nn.Module):
    """One head a task. All exist from the start; those of tasks to come are masked out, those of tasks that are over
    are frozen: no gradient reaches them, and the keys of Memory Heads do not move.

    Args:
        num_features: n.
        class_groups: the classes of each task, which make up 0 to C-1.
        head: makes a task's head from the numbers of features and of its classes.

    Attributes:
        heads: one for each task.
        tasks_begun: how many tasks have begun, a scalar; the heads of the others are masked.

    Raises:
        UserError: if the groups do not hold each class once.

    Shape:
        Input (b, n), output (b, C); classes of masked heads get half the lowest finite value.

    Example:
        >>> heads = TaskHeads(8, [[0, 2], [1]])
        >>> (heads(torch.ones(1, 8)) > -1e30).tolist()
        [[True, False, True]]
        >>> heads.begin_task(1)
        >>> (heads(torch.ones(1, 8)) > -1e30).tolist()
        [[True, True, True]]
    """

    tasks_begun: Tensor

    def __init__(
        self,
        num_features: int,
        class_groups: Sequence[Sequence[int]],
        head: Callable[[int, int], nn.Module] = TruncatedNormalLinear,
    ) -> None:
        super().__init__()
        self.num_features, self._make_head = num_features, head
        self.class_groups: list[list[int]] = []
        self.heads = nn.ModuleList()
        self.add_tasks(class_groups)
        self.register_buffer("tasks_begun", torch.ones((), dtype=torch.long))

    @property
    def num_classes(self) -> int:
        """C."""
        return sum(map(len, self.class_groups))

    def add_tasks(self, class_groups: Sequence[Sequence[int]]) -> None:
        """Make heads for more tasks.

        Args:
            class_groups: the classes of each, which together with those that are there make up 0 to C-1.

        Raises:
            UserError: if the groups do not hold each class once.
        """
        groups = [*self.class_groups, *(list(group) for group in class_groups)]
        classes = [label for group in groups for label in group]
        if not classes or sorted(classes) != list(range(len(classes))) or not all(groups):
            raise UserError(
                f"TaskHeads: class_groups must hold each class from 0 on once, and none may be empty; got {groups}."
            )
        like = next(self.heads.parameters(), None)
        for group in groups[len(self.class_groups) :]:
            head = self._make_head(self.num_features, len(group))
            self.heads.append(head if like is None else head.to(like))
        self.class_groups = groups

    def begin_task(self, task: int) -> None:
        """Unmask the head of a task, counted from 0, and freeze those before it. To be called again is no harm."""
        self.tasks_begun.fill_(task + 1)
        for number, head in enumerate(self.heads):
            head.requires_grad_(number >= task)
            if number < task:
                for parameter in head.parameters():
                    parameter.grad = None  # else an optimizer would go on with weight decay and momentum

    @property
    def classes_begun(self) -> list[int]:
        """The classes of all tasks that have begun, in the order of the stream."""
        return [label for group in self.class_groups[: int(self.tasks_begun)] for label in group]

    def logits_by_task(self, features: Tensor) -> list[Tensor]:
        """Logits (b, classes of the task) of each task that has begun."""
        return [head(features) for head in self.heads[: int(self.tasks_begun)]]

    def logits_of_task(self, features: Tensor, task: int) -> Tensor:
        """Logits (b, C) of one task's head alone; all others are masked."""
        return self._placed(self.heads[task](features), self.class_groups[task])

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, C) of all tasks that have begun."""
        return self._placed(torch.cat(self.logits_by_task(features), dim=1), self.classes_begun)

    def begun(self) -> "BegunHeads":
        """The heads of the tasks that have begun, as they are, for a recorded graph."""
        return BegunHeads(self)

    def _placed(self, logits: Tensor, classes: list[int]) -> Tensor:
        return placed(logits, torch.tensor(classes, device=logits.device), self.num_classes)

    def extra_repr(self) -> str:
        """Classes of each task."""
        return f"class_groups={self.class_groups}"


class BegunHeads(nn.Module):
    """Those of `TaskHeads` whose tasks have begun, fixed.

    Args:
        heads: of all tasks.
    """

    classes: Tensor

    def __init__(self, heads: TaskHeads) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads.heads[: int(heads.tasks_begun)])
        self.num_classes = heads.num_classes
        self.register_buffer("classes", torch.tensor(heads.classes_begun, device=heads.tasks_begun.device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, C)."""
        return placed(torch.cat([head(features) for head in self.heads], dim=1), self.classes, self.num_classes)


def placed(logits: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Logits (b, k) of classes (k,) among those (b, C) of all, of which the others get half the lowest finite value.

    Example:
        >>> placed(torch.ones(1, 1), torch.tensor([1]), 2) > -1e30
        tensor([[False,  True]])
    """
    everything = logits.new_full((logits.shape[0], num_classes), torch.finfo(logits.dtype).min / 2)
    return everything.index_copy(1, classes, logits)
