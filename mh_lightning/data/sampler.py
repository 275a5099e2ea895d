"""The order in which a task's samples are seen."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StreamBatchSampler(Sampler[list[int]]):
    """Batches of indices, the same global batches for any number of ranks.

    Each global batch is dealt out to the ranks in turn. In training the samples of an incomplete last batch that do
    not deal out evenly are left out, since each rank's gradient has the same weight; in evaluation every sample is
    seen exactly once.

    Args:
        num_samples: samples to draw from.
        batch_size: of the global batch, over all ranks.
        seed: seed of the permutation; None keeps the order.
        even: training, see above.
        rank: of this process.
        ranks: number of processes.
        first_batch: iteration begins with this one, since a resumed run has seen those before; they count all the same.

    Example:
        >>> list(StreamBatchSampler(5, batch_size=2))
        [[0, 1], [2, 3], [4]]
        >>> list(StreamBatchSampler(5, batch_size=2, even=True, rank=1, ranks=2))
        [[1], [3]]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int | None = None,
        even: bool = False,
        rank: int = 0,
        ranks: int = 1,
        first_batch: int = 0,
    ) -> None:
        self.first_batch = first_batch
        order = np.arange(num_samples)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(num_samples)
        self._batches = []
        for start in range(0, num_samples, batch_size):
            batch = order[start : start + batch_size]
            if even:
                batch = batch[: len(batch) // ranks * ranks]
            if len(batch):
                self._batches.append(batch[rank::ranks].tolist())
        self._batches = [batch for batch in self._batches if batch]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches[self.first_batch :])

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each batch of this rank."""
        return [len(batch) for batch in self._batches]

    def __len__(self) -> int:
        return len(self._batches)
