"""A method: learning without forgetting (Li and Hoiem, 2016), whose teacher is born after the first task."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.methods import Batch, ContinualMethod, Head


class LwF(ContinualMethod):
    def __init__(self, backbone: nn.Module, head: Head, distillation: float = 1.0, **options: Any) -> None:
        super().__init__(backbone, head, **options)
        self.distillation, self.teacher = distillation, None

    def make_module(self, name: str) -> nn.Module:
        return copy.deepcopy(nn.ModuleDict({"backbone": self.backbone, "head": self.head})).requires_grad_(False).eval()

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = super().training_loss(batch)
        if self.teacher is not None:  # it knows the classes of earlier tasks
            old = [label for group in self.stream.class_groups[: self.task] for label in group]
            told = self.teacher["head"](self.features(batch[0], self.teacher["backbone"]))[:, old].softmax(dim=1)
            losses = F.cross_entropy(logits[:, old], told, reduction="none")
            loss = loss + self.distillation * self.mean_over_samples(losses)
        return loss, logits

    def on_task_end(self, task: int) -> None:
        self.teacher = self.make_module("teacher")
