"""The nearest-class-mean classifier."""

from typing import ClassVar

import torch
from torch import Tensor

from mh_lightning.heads.base import ClosedFormHead


class ClassMeans(ClosedFormHead):
    r"""Running mean :math:`\mu_c` of each class's features; logits are :math:`-\|x - \mu_c\|^2`.

    Features are in units (`ClosedFormHead.unit`), and so are the logits, in their squares. These are up to a constant
    for each sample: where the largest is below -65,536, it is subtracted from all.
    Neither the order of the samples nor how they are cut into batches matters, up to rounding.

    Source: Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost", PAMI
    2013, section 3.2, with the Euclidean distance.

    Args:
        num_features: n.
        num_classes: C.

    Attributes:
        sums: of each class's features in units, (C, n), in float64.

    Example:
        >>> means = ClassMeans(1, 2)
        >>> means.update(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1]))
        >>> means(torch.tensor([[4.0]]))
        tensor([[ -4., -25.]])
    """

    waits: ClassVar[bool] = False  # it predicts each batch before it learns it
    predictions_are_cheap: ClassVar[bool] = True
    in_units: ClassVar[bool] = True
    discriminants: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    sums: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.register_buffer("sums", torch.zeros(num_classes, num_features, dtype=torch.float64))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        self.sums.index_add_(0, targets, features.double())

    def solve(self) -> tuple[Tensor, ...]:
        """The mean of all samples (n,), and how far those of the classes are from it (C, n)."""
        centre = self.sums.sum(dim=0) / self.counts.sum()
        return centre, self.sums / self.counts.clamp_min(1).unsqueeze(1) - centre

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Negative squared distances (b, C)."""
        centre, means = solution  # an offset would cost the squares their digits
        z = features.double() - centre
        return 2 * z @ means.T - z.square().sum(dim=1, keepdim=True) - means.square().sum(dim=1)
