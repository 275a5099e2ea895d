"""FeCAM: Mahalanobis distances by a covariance of each class."""

from torch import nn

from mh_lightning.layers import ShrunkClassCovariances
from mh_lightning.methods.closed_form import ClosedFormMethod


class FeCAM(ClosedFormMethod):
    """Nearest class by Mahalanobis distance of frozen features, see `mh_lightning.layers.ShrunkClassCovariances`.

    Source: Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual
    Learning", NeurIPS 2023.

    Args:
        backbone: maps inputs to features; it is not trained.
        tukey: power of the features' absolute values, above 0; 1 leaves them as they are.
        diagonal_shrinkage: of each covariance, not negative.
        off_diagonal_shrinkage: the same; no more than `diagonal_shrinkage` is always safe.
        normalize: scale transformed features and means to length 1, as the authors' code does.

    Raises:
        UserError: if options are out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tukey: float = 0.5,
        diagonal_shrinkage: float = 1.0,
        off_diagonal_shrinkage: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            ShrunkClassCovariances,
            tukey=tukey,
            diagonal_shrinkage=diagonal_shrinkage,
            off_diagonal_shrinkage=off_diagonal_shrinkage,
            normalize=normalize,
        )
