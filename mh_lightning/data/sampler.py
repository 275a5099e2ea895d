"""The order in which a task's samples are seen."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StreamBatchSampler(Sampler[list[int]]):
    """Batches of indices, the same global batches for any number of ranks.

    Each global batch is dealt out to the ranks in turn, and every sample is seen exactly once. In training all ranks
    have the same number of batches, so that they take their steps together; a rank's share of the last one may be
    empty.

    Args:
        num_samples: samples to draw from.
        batch_size: of the global batch, over all ranks.
        seed: seed of the permutation; None keeps the order.
        even: training: keep a rank's empty share.
        rank: of this process.
        ranks: number of processes.
        first_batch: iteration begins with this one, since a resumed run has seen those before; they count all the same.

    Attributes:
        sizes: number of samples of each global batch.

    Example:
        >>> list(StreamBatchSampler(5, batch_size=2))
        [[0, 1], [2, 3], [4]]
        >>> list(StreamBatchSampler(5, batch_size=2, even=True, rank=1, ranks=2))
        [[1], [3], []]
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
        batches = [order[start : start + batch_size] for start in range(0, num_samples, batch_size)]
        self.sizes = [len(batch) for batch in batches]
        shares = [batch[rank::ranks].tolist() for batch in batches]
        self._batches = [share for share in shares if share or even]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches[self.first_batch :])

    def __len__(self) -> int:
        return len(self._batches)
