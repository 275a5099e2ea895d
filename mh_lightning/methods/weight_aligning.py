"""Weight aligning: distillation and replay, and weights of new classes that are as long as those of old ones."""

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError, require
from mh_lightning.layers import MHLinear
from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.distillation import DistillingMethod, distillation_losses
from mh_lightning.methods.replay import ReplayMethod


@singledispatch
def weights_of_classes(head: Any) -> Tensor:
    """A view (C, ...) of a head's weights, one row a class, without biases.

    Args:
        head: a linear layer or a `MHLinear`, whose rows go over all units.

    Raises:
        UserError: if it is another one.
    """
    raise UserError(
        f"model.init_args.head: WeightAligning scales the weights of each class, and which ones these are in a "
        f"{type(head).__name__} is not known; take torch.nn.Linear or mh_lightning.MHLinear."
    )


@weights_of_classes.register
def _(head: nn.Linear) -> Tensor:
    return head.weight.detach()


@weights_of_classes.register
def _(head: MHLinear) -> Tensor:
    rows, numbers = head.unit_outputs, head.in_features + head.bias  # each output's weights, and its bias
    units: Tensor = head.M.detach()[..., : rows * numbers]
    units = units.view(*units.shape[:2], rows, numbers)[..., : head.in_features]
    return units[0].movedim(1, 0) if head.shared_keys else units[:, :, 0]


def align(weights: Tensor, old: list[int], new: list[int]) -> None:
    """Scale the weights of new classes, in place, such that their mean norm is that of old ones.

    Args:
        weights: (C, ...).
        old: classes.
        new: classes.

    Example:
        >>> weights = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
        >>> align(weights, [0], [1])
        >>> weights
        tensor([[3., 4.],
                [0., 5.]])
    """
    norms = weights.flatten(1).norm(dim=1)
    mean_of_new = norms[new].mean()
    if mean_of_new > 0:
        weights[new] *= norms[old].mean() / mean_of_new


class WeightAligning(DistillingMethod, ReplayMethod):
    r"""Learns each batch and what is replayed with it by :math:`(1 - \lambda)` times their cross-entropy and
    :math:`\lambda` times their distance from the answers before the task, with :math:`\lambda = o / (o + k)` of o
    earlier classes and the task's k; when a task ends, the weights of its new classes are scaled to the mean norm of
    the others.

    Source: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020. Exemplars
    come from a reservoir here, and are replayed with each batch.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn from the buffer for each batch, over all devices.
        temperature: of distillation, above 0.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size=buffer_size, replay_batch_size=replay_batch_size, **options)
        require("model.init_args.temperature", temperature, above=0, below=math.inf)
        self.temperature = temperature

    def make_parts(self) -> None:
        """Make the head, whose weights can be scaled, and the buffer."""
        super().make_parts()
        weights_of_classes(self.head)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of the batch and of what is replayed."""
        assert self.replay_buffer is not None and self.head is not None
        inputs, classes, rows = self.joined(batch, self.replay_buffer.draw(self.replay_batch_size))
        new = len(batch[1])
        features = self.features(inputs)
        logits = self.head(features)
        seen = torch.cat([self.seen_by_loss(logits[:new], batch[1]), logits[new:]])
        loss = self.mean_loss(seen, classes, rows)
        if self.teacher is not None:
            old = self.classes_until(self.task)
            distillation = len(old) / (len(old) + len(self.stream.class_groups[self.task]))
            losses = distillation_losses(logits[:, old], self.told(inputs, features)[:, old], self.temperature)
            loss = (1 - distillation) * loss + distillation * self.mean_over_samples(losses, rows)
        self.remember(batch)
        return loss, logits[:new]

    @torch.no_grad()
    def on_task_end(self, task: int) -> None:
        """Align, and keep the model so."""
        old = self.classes_until(task)
        new = sorted({*self.classes_until(task + 1)} - {*old})
        if old and new:
            align(weights_of_classes(self.head), old, new)
        super().on_task_end(task)
