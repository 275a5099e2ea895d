"""Learning without forgetting: the model tells itself what it answered before a task."""

import math
from typing import Any

from torch import Tensor, nn

from mh_lightning.errors import require
from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.distillation import DistillingMethod, distillation_losses


class LwF(DistillingMethod):
    r"""Adds :math:`\lambda\, T^2\, \mathrm{KL}` between the answers of the model before the task and now, among the
    classes of earlier tasks, on the samples of the new one. No sample is kept.

    With ``classes_in_loss: task`` new samples push down no class of an earlier task, as in the published method, where
    each task has outputs of its own; with the default, all classes are told apart.

    Source: Li and Hoiem, "Learning without Forgetting", ECCV 2016, with one head for all classes.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        distillation: :math:`\lambda`, at least 0.
        temperature: T, above 0.
        options: of `ContinualMethod`.
    """

    def __init__(
        self, backbone: nn.Module, head: Head, distillation: float = 1.0, temperature: float = 2.0, **options: Any
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.distillation", distillation, at_least=0, below=math.inf)
        require("model.init_args.temperature", temperature, above=0, below=math.inf)
        self.distillation, self.temperature = distillation, temperature

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of the batch, and of forgetting what was answered to it."""
        x, targets, _ = batch
        assert self.head is not None
        features = self.features(x)
        logits = self.head(features)
        loss = self.mean_loss(self.seen_by_loss(logits, targets), targets)
        if self.teacher is not None:
            old = self.classes_until(self.task)
            losses = distillation_losses(logits[:, old], self.told(x, features)[:, old], self.temperature)
            loss = loss + self.distillation * self.mean_over_samples(losses)
        return loss, logits
