"""Deep streaming linear discriminant analysis."""

from torch import nn

from mh_lightning.layers import StreamingLinearDiscriminant
from mh_lightning.methods.closed_form import ClosedFormMethod


class StreamingLDA(ClosedFormMethod):
    """Linear discriminants of frozen features, see `mh_lightning.layers.StreamingLinearDiscriminant`.

    Source: Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR
    Workshops 2020.

    Args:
        backbone: maps inputs to features; it is not trained.
        shrinkage: of the covariance towards a multiple of the identity, from 0 to 1.

    Raises:
        UserError: if the shrinkage is out of range.
    """

    def __init__(self, backbone: nn.Module, shrinkage: float = 1e-4) -> None:
        super().__init__(backbone, StreamingLinearDiscriminant, shrinkage=shrinkage)
