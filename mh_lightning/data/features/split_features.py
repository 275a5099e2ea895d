"""Features of a stream's splits, found in the feature cache or extracted into it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.data.features.cache import FeatureCache
from mh_lightning.data.features.file_digests import FileDigests
from mh_lightning.data.features.fingerprint import image_digests
from mh_lightning.data.labelled import Labelled, StreamDataset
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError


class SplitFeatures:
    """Features of each split, asked for once.

    Args:
        cache: where they are kept.
        num_workers: of the data module.
    """

    def __init__(self, cache: FeatureCache, num_workers: int) -> None:
        self.cache, self.num_workers = cache, num_workers
        self._digests: dict[str, list[bytes]] = {}
        self._found: dict[tuple[str, bool], StoredFeatures] = {}  # by split, and whether augmented

    def forget(self) -> None:
        """Ask anew, since the backbone may be another one; images stay what they are."""
        self._found.clear()

    def of(
        self,
        split: str,
        samples: Labelled,
        backbone: Backbone,
        transform: Callable[[Any], Tensor] | None,
        augment: bool,
        trainer: Trainer,
        perturbations: Sequence[Perturbation],
        perturbation_seed: Sequence[int],
    ) -> StoredFeatures:
        """Features of all samples of a split.

        Raises:
            UserError: if the samples are no images.
        """
        if (split, augment) in self._found:
            return self._found[split, augment]
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        if samples.features is not None:
            raise UserError("data.feature_cache is for images, and this data set holds features; leave it out.")
        if split not in self._digests:
            files = partial(FileDigests(Path(self.cache.folder).expanduser()).of, quiet=quiet)
            self._digests[split] = image_digests(samples, perturbations, perturbation_seed, files)
        no_task = np.zeros(len(samples.labels), dtype=np.int64)
        self._found[split, augment] = self.cache.features(
            self._digests[split],
            StreamDataset(samples, no_task, transform, perturbations, perturbation_seed).input,
            backbone,
            transform,
            augment=augment,
            device=trainer.strategy.root_device,
            num_workers=self.num_workers,
            local_ranks=trainer.num_devices,
            quiet=quiet,
        )
        return self._found[split, augment]
