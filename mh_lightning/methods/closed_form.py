"""Heads that are solved from sums, on frozen features, in one pass."""

from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.distributed import gather_in_turn
from mh_lightning.errors import UserError, blame
from mh_lightning.heads import ClosedFormHead
from mh_lightning.methods.base import Batch, ContinualMethod, Head, Learnt
from mh_lightning.methods.first_task_adaptation import FirstTaskAdaptation


class ClosedForm(ContinualMethod):
    """A head in closed form on frozen features: it adds up what it needs to know of the samples, and nothing is
    optimized. One epoch a task is all it can use; the others are skipped.

    Which method that is follows from the head: a Memory Head in closed form (`KernelMemoryUnits`), one ridge
    regression (`RidgeRegression`), nearest class mean (`ClassMeans`), streaming LDA (`StreamingLinearDiscriminant`),
    RanPAC without adaptation of the backbone (`RandomProjectionRidge` as published, `RandomFeatureRidge` on normalised
    features), KLDA (`RandomFeatureDiscriminant`), LoRanPAC (`TruncatedProjection`), FeCAM (`ShrunkClassCovariances`),
    LR-RGDA (`RegularisedDiscriminant`), and the upper bounds `JointLogisticRegression` and `JointKernelRidge`, which
    keep all samples; all in `mh_lightning.heads`.

    Each rank's head learns the samples of all ranks, in the order of the stream, so N processes end up with the state
    of one. Features are far smaller than sums of their products, so they are what ranks exchange, before the head looks
    at them: what one rank brings that cannot be learnt is refused on all of them. The head is solved at the end of each
    task that an evaluation follows. Answers become probabilities by one temperature, which is chosen on samples that
    were learnt, see `ClosedFormHead`. Training predicts nothing, unless the head says that its `predictions_are_cheap`.

    Args:
        backbone: maps inputs to features; it is not trained.
        head: makes the head, a `mh_lightning.heads.ClosedFormHead`, from the numbers of features and of classes.
        first_task_adaptation: train the backbone on the first task before anything else, see `FirstTaskAdaptation`.

    Attributes:
        adapted: whether that has been done.

    Raises:
        UserError: if it makes another one, or an option of the head cannot be used.

    Example:
        >>> from functools import partial
        >>> from mh_lightning.heads import ClassMeans, RandomProjectionRidge
        >>> nearest_class_mean = ClosedForm(nn.Identity(), ClassMeans)
        >>> ranpac = ClosedForm(nn.Identity(), partial(RandomProjectionRidge, num_projections=5000))
        >>> ClosedForm(nn.Identity(), nn.Linear)
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: model.init_args.head makes a Linear; ClosedForm needs a head in closed form, \
such as mh_lightning.heads.KernelMemoryUnits.
    """

    needs_task_borders = False  # what it does at the end of a task is for the evaluation that follows

    adapted: Tensor

    def __init__(
        self, backbone: nn.Module, head: Head, first_task_adaptation: FirstTaskAdaptation | None = None
    ) -> None:
        with torch.device("meta"), blame("model.init_args.head"):
            tried = head(1, 1)  # which refuses what it cannot use, before any data are read
        if not isinstance(tried, ClosedFormHead):
            raise UserError(
                f"model.init_args.head makes a {type(tried).__name__}; ClosedForm needs a head in closed form, such as "
                "mh_lightning.heads.KernelMemoryUnits."
            )
        super().__init__(backbone, head)
        self.automatic_optimization = False
        self.first_task_adaptation = first_task_adaptation
        if first_task_adaptation is not None:
            self.register_buffer("adapted", torch.zeros((), dtype=torch.bool))

    def on_fit_start(self) -> None:
        """See that there is something to adapt, if anything is to be."""
        if self.first_task_adaptation is not None and not bool(self.adapted):
            self.first_task_adaptation.check(self)
        super().on_fit_start()

    def on_task_start(self, task: int) -> None:
        """Adapt the backbone, before the first task of all."""
        if self.first_task_adaptation is not None and not bool(self.adapted):
            self.first_task_adaptation.adapt(self)
            self.backbone.finish_training()
            self.adapted.fill_(True)

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Give the backbone the form of an adapted one, if the checkpoint's is."""
        if self.first_task_adaptation is not None and bool(checkpoint["state_dict"].get("adapted", False)):
            self.backbone.finish_training()
        super().complete(checkpoint)

    def configure_optimizers(self) -> None:
        """There is nothing to optimize."""
        return

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C) of a batch of inputs, whose softmax are the head's probabilities."""
        return self.closed_form_head.calibrated(self.features(x))

    def answering_head(self) -> nn.Module:
        """The head as it is solved now."""
        return self.closed_form_head.solved()

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> Learnt | None:
        """Learn a batch, or a chunk, in the first epoch of its task."""
        if self.trainer.current_epoch % self.stream.epochs_per_task:
            return None
        return self.learn(self.features(batch[0]), batch[1])

    def learn(self, features: Tensor, targets: Tensor) -> Learnt | None:
        """Learn this rank's features (b, n) of classes (b,), and those of the other ranks; and, where predictions are
        cheap, tell which were classified correctly before that, batch after batch of a chunk.
        """
        if not self.closed_form_head.predictions_are_cheap:
            self.update_head(features, targets)
            return None
        correct = []
        size = self.stream.batch_size
        for rows, classes in zip(*(torch.split(part, size) for part in (features, targets)), strict=True):
            correct.append(self.closed_form_head(rows).argmax(dim=1) == classes)
            self.update_head(rows, classes)
        logits = self.closed_form_head(features)
        self.log_training(self.mean_loss(logits, targets), logits, targets)
        return Learnt(correct=torch.cat(correct))

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
