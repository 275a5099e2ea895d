"""The nearest-class-mean classifier, the simplest rival on frozen features."""

import torch
from torch import Tensor, nn

from mh_lightning.layers import ClassMeans
from mh_lightning.methods.base import Learnt
from mh_lightning.methods.closed_form import ClosedFormMethod


class NearestClassMean(ClosedFormMethod):
    """Classify by the nearest class mean of the features, see `mh_lightning.layers.ClassMeans`. One epoch a task is all
    it can use; nothing is optimized.

    Predictions are cheap here, so it also tells which samples it would have classified correctly before it learnt them.

    Args:
        backbone: maps inputs to features; it is not trained.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone, ClassMeans)

    def learn(self, features: Tensor, targets: Tensor) -> Learnt:
        """Classify and then learn, batch after batch of a chunk."""
        correct = []
        size = self.stream.batch_size
        for rows, classes in zip(*(torch.split(part, size) for part in (features, targets)), strict=True):
            correct.append(self.closed_form_head(rows).argmax(dim=1) == classes)
            self.update_head(rows, classes)
        logits = self.closed_form_head(features)
        self.log_training(self.mean_loss(logits, targets), logits, targets)
        return Learnt(correct=torch.cat(correct))
