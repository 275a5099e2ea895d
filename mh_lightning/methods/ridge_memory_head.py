"""A Memory Head whose units are ridge regressions."""

from torch import nn

from mh_lightning.layers import RidgeMemoryUnits
from mh_lightning.methods.closed_form import ClosedFormMethod


class RidgeMemoryHead(ClosedFormMethod):
    """A Memory Head in closed form on frozen features, in one pass: `mh_lightning.layers.RidgeMemoryUnits`.

    Source: see there.

    Args:
        backbone: maps inputs to features; it is not trained.
        key_mem_units: number of memory units.
        delta: units that a sample attends to.
        ridge: a number, or "auto" for generalised cross-validation.
        shared_unit: whether units answer what one regression of all samples leaves over.
        normalization: of the features: "none", "l2" or "sqrt".
        num_projections: number of random features, by default none.
        projections_beside: number of random features of one more regression beside the units, by default none.
        seed: of the random features, by default that of the run.
        settle: samples that a key moves with.
        tau_mu: wins below which a unit can be dead.
        tau_eta: age from which it is, in samples.
        max_bytes: refuse to begin where the head's state would need more bytes.

    Raises:
        UserError: if options are out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        key_mem_units: int = 10,
        delta: int = 2,
        ridge: float | str = "auto",
        shared_unit: bool = True,
        normalization: str = "sqrt",
        num_projections: int | None = None,
        projections_beside: int | None = None,
        seed: int | None = None,
        settle: int = 10,
        tau_mu: int = 10,
        tau_eta: int = 1000,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            RidgeMemoryUnits,
            key_mem_units=key_mem_units,
            delta=delta,
            ridge=ridge,
            shared_unit=shared_unit,
            normalization=normalization,
            num_projections=num_projections,
            projections_beside=projections_beside,
            seed=seed,
            settle=settle,
            tau_mu=tau_mu,
            tau_eta=tau_eta,
            max_bytes=max_bytes,
        )
