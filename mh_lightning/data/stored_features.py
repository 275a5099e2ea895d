"""Features that lie in files mapped into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class StoredFeatures(Sequence[Tensor]):
    """Features of samples, wherever in the shards they are.

    Args:
        shards: features (images, views, d) of each shard, float32 or float16.
        places: shard and row of each sample, (samples, 2).
        views: which view of each sample to take, (samples,); by default the first.

    Example:
        >>> shards = [np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)]
        >>> stored = StoredFeatures(shards, np.array([[1, 0], [0, 0], [1, 0]]))
        >>> stored.gather(np.array([0, 1]))
        tensor([[1., 1.],
                [0., 0.]])
    """

    def __init__(
        self, shards: Sequence[NDArray[Any]], places: NDArray[np.int64], views: NDArray[np.int64] | None = None
    ) -> None:
        self.shards, self.places = shards, places
        self.views = np.zeros(len(places), dtype=np.int64) if views is None else views

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.gather([index])[0]

    def take(self, rows: NDArray[np.int64]) -> "StoredFeatures":
        """Some of the samples."""
        return StoredFeatures(self.shards, self.places[rows], self.views[rows])

    def one_view_each(self, seed: int | None) -> "StoredFeatures":
        """With a random view of each sample, or the first one without a seed."""
        num_views = self.shards[0].shape[1]
        if seed is None or num_views == 1:
            return self
        views = np.random.default_rng(seed).integers(num_views, size=len(self.places))
        return StoredFeatures(self.shards, self.places, views)

    def gather(self, rows: NDArray[np.int64] | list[int]) -> Tensor:
        """Features (rows, d) in float32."""
        features = np.empty((len(rows), self.shards[0].shape[2]), dtype=np.float32)
        # row by row: to group them by shard takes longer than to copy them
        for row, ((shard, image), view) in enumerate(
            zip(self.places[rows].tolist(), self.views[rows].tolist(), strict=True)
        ):
            features[row] = self.shards[shard][image, view]
        return torch.from_numpy(features)
