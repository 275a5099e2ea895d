"""GDumb: a class-balanced buffer, and a model trained on it from scratch."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from mh_lightning.methods.base import Batch, Head, Learnt
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.replay_buffer import ClassBalancedBuffer
from mh_lightning.methods.retraining import RetrainingMethod
from mh_lightning.random_numbers import global_seed


class GDumb(RetrainingMethod, ReplayMethod):
    """Keeps a class-balanced buffer, and at the end of each task learns from it alone, from scratch.

    Source: Prabhu, Torr, Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning",
    ECCV 2020.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, a step when learning from the buffer, over all devices.
        epochs: at least 1 pass over the buffer at the end of a task.
        options: of `ContinualMethod`.
    """

    buffer_kind = ClassBalancedBuffer

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        epochs: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone, head, epochs=epochs, buffer_size=buffer_size, replay_batch_size=replay_batch_size, **options
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Learnt:
        """Classify, and remember."""
        learnt = super().training_step(batch, batch_idx)
        self.remember(batch)
        return learnt

    def batches(self, task: int, epoch: int) -> Iterable[tuple[Batch, int]]:
        """The buffer in a random order."""
        assert self.replay_buffer is not None
        content = self.replay_buffer.content()
        seed = [global_seed() or 0, self.stream.num_earlier_tasks + task, epoch]
        order = np.random.default_rng(seed).permutation(len(content[0]))
        for start in range(0, len(order), self.replay_batch_size):
            places = order[start : start + self.replay_batch_size]
            inputs, targets, tasks = self.share(tuple(part[places] for part in content))
            yield (inputs, targets, tasks), len(places)
