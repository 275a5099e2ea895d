"""RanPAC: ridge regression on randomly projected features."""

from torch import nn

from mh_lightning.layers import RandomProjectionRidge
from mh_lightning.methods.closed_form import ClosedFormMethod


class RanPAC(ClosedFormMethod):
    """Ridge regression on random features of frozen features, see `mh_lightning.layers.RandomProjectionRidge`. The
    published method can also adapt the backbone in the first task; here it is frozen.

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.

    Args:
        backbone: maps inputs to features; it is not trained.
        num_projections: number of random features.
        seed: of the random features, by default that of the run.

    Raises:
        UserError: if options are out of range.
    """

    def __init__(self, backbone: nn.Module, num_projections: int = 5000, seed: int | None = None) -> None:
        super().__init__(backbone, RandomProjectionRidge, num_projections=num_projections, seed=seed)
