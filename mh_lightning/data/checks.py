"""What is wrong with a stream's options, its data or a checkpoint of another one, said before training starts."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError

if TYPE_CHECKING:
    from mh_lightning.data.stream import StreamDataModule


def check_options(stream: "StreamDataModule") -> None:
    """Refuse options of `StreamDataModule` that cannot be used, or not together.

    Raises:
        UserError: names the option.
    """
    for name in (
        "epochs_per_task",
        "batch_size",
        "eval_batch_size",
        "evaluate_every_n_tasks",
        "max_train_samples",
        "max_test_samples",
    ):
        value = getattr(stream, name)
        if value is not None and value < 1:
            raise UserError(f"data.{name} must be at least 1, got {value}.")
    if stream.image_transforms not in get_args(ImageTransforms):
        raise UserError(
            f"data.image_transforms must be one of {', '.join(get_args(ImageTransforms))}; "
            f"got {stream.image_transforms!r}."
        )
    if stream.num_workers < 0:
        raise UserError(f"data.num_workers must not be negative, got {stream.num_workers}.")
    if not 0 <= stream.split_seed < 2**32:
        raise UserError(f"data.split_seed must lie in [0, 2**32), got {stream.split_seed}.")
    if not 0 <= stream.validation_fraction < 1:
        raise UserError(f"data.validation_fraction must lie in [0, 1), got {stream.validation_fraction}.")
    chunk_size, batch_size, cache = stream.chunk_size, stream.batch_size, stream.feature_cache
    if chunk_size is not None and (chunk_size < 1 or chunk_size % batch_size):
        raise UserError(f"data.chunk_size={chunk_size} must be a multiple of data.batch_size={batch_size}.")
    if cache is not None and cache.views > 1 and not stream.augment:
        raise UserError(f"data.feature_cache.views={cache.views} needs data.augment=true.")
    if stream.validation_fraction and stream.split_fractions is not None:
        raise UserError("data.validation_fraction and data.split_fractions exclude each other; give one.")


def check_same_stream(saved: dict[str, Any], own: dict[str, Any], names: Collection[str] | None = None) -> None:
    """Compare the stream of a checkpoint with this one, in all or in some of what `state_dict` tells.

    Raises:
        UserError: if they differ.
    """
    for name, value in saved.items():
        if (names is None or name in names) and value != own[name]:
            raise UserError(
                f"ckpt_path: the checkpoint comes from another stream, with {name} {value} instead of {own[name]}; "
                "use the configuration it was trained with."
            )


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
