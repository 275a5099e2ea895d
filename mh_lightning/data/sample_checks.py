"""What is wrong with the samples of a stream, said before training starts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError


def check_labels(labels: NDArray[np.int64], num_classes: int, split: str) -> None:
    """Refuse labels outside 0 to C-1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"data: {split} labels must lie in 0 to {num_classes - 1} (C-1, with {num_classes} classes), "
            f"got {int(wrong[0])}."
        )


def check_domains(domains: NDArray[np.int64], num_domains: int, split: str) -> None:
    """Refuse domains outside 0 to D-1."""
    wrong = domains[(domains < 0) | (domains >= num_domains)]
    if len(wrong):
        raise UserError(
            f"data: {split} domains must lie in 0 to {num_domains - 1} (the training samples have {num_domains}), "
            f"got {int(wrong[0])}."
        )


def check_finite(inputs: Sequence[str] | Tensor | Rows | StoredFeatures, split: str) -> None:
    """Refuse NaN and infinite values in tensors."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        broken = (~inputs.reshape(len(inputs), -1).isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise UserError(
                f"data: {split} inputs hold NaN or infinite features, in sample {int(broken[0])} first; "
                "remove or mend these samples."
            )


def check_scenario(scenario: str, samples: Labelled) -> None:
    """Refuse a scenario that needs domains or features that the samples have not."""
    if samples.domains is None and scenario in ("DI", "CDI", "CDID"):
        raise UserError(
            f"data.scenario={scenario} needs domains, and this data set has none; give images "
            "data.perturbations, or tensors an entry domain_train."
        )
    if scenario == "CDID" and samples.features is None:
        raise UserError("data.scenario=CDID orders samples by their first feature, and images have none; use CDI.")
