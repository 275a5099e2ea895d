"""Joint training: the upper bound of continual learning."""

from collections.abc import Iterable
from typing import Any

from mh_lightning.errors import UserError
from mh_lightning.methods.base import Batch
from mh_lightning.methods.retraining import RetrainingMethod


class JointTraining(RetrainingMethod):
    """At the end of each task, learns all training samples so far, in random order, from scratch.

    See `RetrainingMethod` for the arguments. Batches have the data module's `batch_size`.
    """

    def configure_model(self) -> None:
        """Make the head.

        Raises:
            UserError: if a fit goes on without the samples of an earlier one.
        """
        if self.goes_on:
            raise UserError(
                "JointTraining learns the samples of all tasks together, so it cannot go on without those of an "
                "earlier fit; make a new method for one stream of all tasks."
            )
        super().configure_model()

    def batches(self, task: int, epoch: int) -> Iterable[tuple[Batch, int]]:
        """The samples of all tasks so far."""
        loader: Any = self.stream.joint_train_dataloader(task, epoch)
        return zip(loader, loader.batch_sampler.sizes, strict=True)
