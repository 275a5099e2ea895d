"""What methods share that solve their head in closed form, on frozen features."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.distributed import gather_in_turn
from mh_lightning.errors import blame
from mh_lightning.layers import ClosedFormHead
from mh_lightning.methods.base import Batch, ContinualMethod, Learnt


class ClosedFormMethod(ContinualMethod):
    """A method whose head keeps sums of frozen features, and nothing is optimized. One epoch a task is all it can use;
    the others are skipped.

    Training predicts nothing, since to solve costs more than to learn: the head is solved at the end of each task that
    an evaluation follows.
    Each rank's head learns the samples of all ranks, in the order of the stream, so N processes end up with the state
    of one. Features are far smaller than sums of their products, so they are what ranks exchange, before the head looks
    at them: what one rank brings that cannot be learnt is refused on all of them.

    Args:
        backbone: maps inputs to features; it is not trained.
        head: the kind of head.
        options: of the head.

    Raises:
        UserError: if an option cannot be used.
    """

    def __init__(self, backbone: nn.Module, head: type[ClosedFormHead], **options: Any) -> None:
        with torch.device("meta"):
            head(1, 1, **options)  # which refuses what it cannot use, before any data are read
        super().__init__(backbone, partial(head, **options))
        self.automatic_optimization = False

    def configure_optimizers(self) -> None:
        """There is nothing to optimize."""
        return

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> Learnt | None:
        """Learn a batch, or a chunk, in the first epoch of its task."""
        if self.trainer.current_epoch % self.stream.epochs_per_task:
            return None
        return self.learn(self.features(batch[0]), batch[1])

    def learn(self, features: Tensor, targets: Tensor) -> Learnt | None:
        """Learn this rank's features (b, n) of classes (b,), and those of the other ranks."""
        self.update_head(features, targets)
        return None

    def update_head(self, features: Tensor, targets: Tensor) -> None:
        """Count this rank's features (b, n) of classes (b,), and those of the other ranks.

        Raises:
            UserError: on all ranks, if the head refuses those of one, such as features that are not finite.
        """
        rows = gather_in_turn(features, targets)
        with blame("model.init_args.backbone, or the training data"):
            self.closed_form_head.update(*rows)

    def on_task_end(self, task: int) -> None:
        """Solve where predictions follow, so that it counts as training."""
        if self.stream.evaluates_after(task):
            self.closed_form_head.ensure_solved()

    @property
    def closed_form_head(self) -> ClosedFormHead:
        """The head."""
        assert isinstance(self.head, ClosedFormHead)
        return self.head
