"""Joint training: the upper bound of continual learning."""

from collections.abc import Iterable
from typing import Any

from mh_lightning.methods.base import Batch
from mh_lightning.methods.retraining import RetrainingMethod


class JointTraining(RetrainingMethod):
    """At the end of each task, learns all training samples so far, in random order, from scratch.

    See `RetrainingMethod` for the arguments. Batches have the data module's `batch_size`.
    """

    def batches(self, task: int, epoch: int) -> Iterable[tuple[Batch, int]]:
        """The samples of all tasks so far."""
        loader: Any = self.stream.joint_train_dataloader(task, epoch)
        return zip(loader, loader.batch_sampler.sizes, strict=True)
