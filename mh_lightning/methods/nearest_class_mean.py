"""The nearest-class-mean classifier, the simplest rival on frozen features."""

import torch
from torch import Tensor, nn

from mh_lightning.backbones import Backbone
from mh_lightning.distributed import gather_rows
from mh_lightning.methods.base import Batch, ContinualMethod, Learnt


class ClassMeans(nn.Module):
    """Running mean of each class's features; logits are negative squared distances to the means.

    Args:
        num_features: n.
        num_classes: C.

    Example:
        >>> means = ClassMeans(1, 2)
        >>> means.update(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1]))
        >>> means(torch.tensor([[4.0]]))
        tensor([[ -4., -25.]])
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, num_features, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        self.nothing = nn.Parameter(torch.empty(0))  # DistributedDataParallel wants something to train

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Count features (b, n) of classes (b,)."""
        self.sums.index_add_(0, targets, features.double())
        self.counts += torch.bincount(targets, minlength=len(self.counts))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, C); classes not seen yet get the lowest finite value."""
        means = self.sums / self.counts.clamp_min(1).unsqueeze(1)
        logits = -torch.cdist(features.double(), means).square().to(torch.promote_types(features.dtype, torch.float32))
        return logits.masked_fill(self.counts == 0, torch.finfo(logits.dtype).min / 2)


class NearestClassMean(ContinualMethod):
    """Classify by the nearest class mean of the features. One epoch a task is all it can use; nothing is optimized.

    Args:
        backbone: maps inputs to features; it is not trained.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, ClassMeans)
        self.automatic_optimization = False

    def configure_optimizers(self) -> None:
        """There is nothing to optimize."""
        return

    def training_step(self, batch: Batch, batch_idx: int) -> Learnt | None:
        """Add a batch to the class means, in the first epoch of a task."""
        if self.trainer.current_epoch % self.trainer.datamodule.epochs_per_task:  # type: ignore[attr-defined]
            return None
        x, targets, _ = batch
        with torch.no_grad():
            assert isinstance(self.head, ClassMeans)
            own_features = self.features(x)
            correct = self.head(own_features).argmax(dim=1) == targets
            features, targets = gather_rows(own_features, targets)
            self.head.update(features, targets)
            logits = self.head(features)
        self.log_training(self.losses(logits, targets).mean(), logits, targets)
        return Learnt(correct=correct)
