"""An ensemble of heads."""

from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import require
from mh_lightning.growth import grown
from mh_lightning.methods.base import Batch, ContinualMethod, Head


class EnsembleHead(nn.Module):
    """Heads whose class probabilities are averaged.

    Args:
        members: heads of the same size, at least 1.

    Example:
        >>> probabilities = EnsembleHead([nn.Linear(2, 3), nn.Linear(2, 3)])(torch.ones(4, 2)).exp()
        >>> probabilities.sum(dim=1).allclose(torch.ones(4))
        True
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        """Logarithm of the mean probabilities (b, C), from features (b, n)."""
        return mean_of_members(self.logits_of_members(features))

    def logits_of_members(self, features: Tensor) -> Tensor:
        """Logits (members, b, C)."""
        return torch.stack([member(features) for member in self.members])


@grown.register
def _(head: EnsembleHead, num_classes: int) -> EnsembleHead:
    return EnsembleHead([grown(member, num_classes) for member in head.members])


def mean_of_members(logits: Tensor) -> Tensor:
    """Logarithm of the mean of the members' probabilities (b, C), from logits (members, b, C)."""
    return torch.logsumexp(torch.log_softmax(logits, dim=2), dim=0) - torch.tensor(float(len(logits))).log()


class Ensemble(ContinualMethod):
    """Heads that start from different weights and learn the same stream, each by its own loss; their class
    probabilities are averaged.

    Source: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles", NeurIPS 2017, on a stream.

    Args:
        backbone: maps inputs to features, for all members.
        head: makes each member from the numbers of features and of classes.
        members: number of heads, at least 1.
        options: of `ContinualMethod`.
    """

    def __init__(self, backbone: nn.Module, head: Head, members: int = 5, **options: Any) -> None:
        require("model.init_args.members", members, at_least=1, whole=True)
        super().__init__(backbone, head, **options)
        self.members = members

    def make_head(self) -> EnsembleHead:
        """The members, for all classes of the stream."""
        features, classes = self.backbone.num_features, self.stream.num_classes
        return EnsembleHead([self._make_head(features, classes) for _ in range(self.members)])

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the members' mean losses, and the ensemble's logits."""
        x, targets, _ = batch
        assert isinstance(self.head, EnsembleHead)
        logits = self.head.logits_of_members(self.features(x))
        loss = torch.stack([self.mean_loss(self.seen_by_loss(one, targets), targets) for one in logits]).sum()
        return loss, mean_of_members(logits.detach())
