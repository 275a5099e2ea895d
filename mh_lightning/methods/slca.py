"""Slow learner with classifier alignment, and sequential fine-tuning with one head a task."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mh_lightning.compat.lightning_names import expect_unused_parameters
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassGaussians, TaskHeads, TruncatedNormalLinear
from mh_lightning.layers import MHLinear
from mh_lightning.methods.alignment import ClassifierAlignment
from mh_lightning.methods.base import Batch, ContinualMethod, Head
from mh_lightning.methods.task_samples import features_of_task, shows_progress
from mh_lightning.random_numbers import seed_from


class SLCA(ContinualMethod):
    """Trains the backbone slowly and one head a task, each on the classes of its task alone, then aligns all heads.

    A head learns by the cross-entropy over the logits of its own task, with a new optimizer and scheduler, and is
    frozen when the task is over. With `alignment`, the means and covariances of the task's classes are then gathered in
    one pass over its training samples, with the transform of evaluation, and from the second task on a copy of all
    heads is aligned; predictions are those of the copy until the next task begins, which goes on from the heads before
    alignment. How slowly the backbone learns is an option of the backbone (``learning_rate_factor``).

    - SLCA as published: a backbone with a factor of 0.01, and an alignment.
    - Slow learner: the same without alignment (``alignment: null``).
    - Sequential fine-tuning: without alignment, and with a factor of 1.
    - Memory Heads on SLCA: `head` is `MHLinear` with its options. Heads of former tasks do not move, keys included,
      where those of the published code scramble on when the backbone is tuned.

    In training, ``train/accuracy`` is that among the task's classes.

    Args:
        backbone: maps inputs to features.
        head: makes a task's head from the numbers of features and of the task's classes.
        optimizer: makes the optimizer of a task.
        lr_scheduler: makes the learning-rate scheduler, stepped once an epoch.
        alignment: how heads are aligned, or null to leave them as they were trained.

    Raises:
        UserError: if a class belongs to several tasks, or a head has nothing to train.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
    ICCV 2023; Tiezzi et al., CoLLAs 2024, section 4 (Memory Heads).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head = TruncatedNormalLinear,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        alignment: ClassifierAlignment | None = None,
    ) -> None:
        super().__init__(backbone, head, optimizer, lr_scheduler, classes_in_loss="task", reset_optimizer=True)
        self.alignment = alignment
        self.aligned_heads: TaskHeads | None = None
        self.class_gaussians: ClassGaussians | None = None

    def configure_model(self) -> None:
        """Make the heads of all tasks, of which a step uses one."""
        super().configure_model()
        groups = self.stream.learnt().class_groups
        if self.goes_on and self.task_heads.class_groups != groups:
            raise UserError(
                f"{type(self).__name__} has heads for tasks of classes {self.task_heads.class_groups}, so further "
                f"tasks must be of new classes, each in one of them; got {groups[len(self.task_heads.class_groups) :]}."
            )
        if isinstance(self.trainer.strategy, DDPStrategy):
            expect_unused_parameters(self.trainer.strategy)

    def make_parts(self) -> None:
        """Make the heads of all tasks, and what aligns them."""
        super().make_parts()
        if self.alignment is not None:
            self.aligned_heads = copy.deepcopy(self.task_heads).requires_grad_(False)
            self.aligned_heads.tasks_begun.zero_()
            vars(self.aligned_heads)["same_on_all_ranks"] = True
            self.class_gaussians = self.alignment.class_gaussians(self.backbone.num_features, self.stream.num_classes)

    def grow_parts(self) -> None:
        """Heads for the new tasks."""
        groups = self.stream.class_groups
        if self.task_heads.class_groups == self.stream.learnt().class_groups:
            return  # a fit that failed has made them
        if int(self.task_heads.tasks_begun) < len(self.task_heads.class_groups):
            raise UserError(
                f"{type(self).__name__}: the run was cut short after task {int(self.task_heads.tasks_begun)} of "
                f"{len(self.task_heads.class_groups)}, so it cannot go on with others; resume it with ckpt_path."
            )
        self._check_each_in_one_task([*self.task_heads.class_groups, *groups])
        self.task_heads.add_tasks(groups)
        if self.aligned_heads is not None and self.class_gaussians is not None:
            self.aligned_heads.add_tasks(groups)
            self.aligned_heads.requires_grad_(False)
            self.class_gaussians.grow(self.stream.num_classes)

    def make_head(self) -> nn.Module:
        """One head a task.

        Raises:
            UserError: if a class belongs to several tasks.
        """
        stream = self.stream.learnt()
        self._check_each_in_one_task(stream.class_groups)
        heads = TaskHeads(self.backbone.num_features, stream.class_groups, self._make_head)
        if not all(any(parameter.requires_grad for parameter in head.parameters()) for head in heads.heads):
            raise UserError(
                f"model.init_args.head: {type(heads.heads[0]).__name__} has nothing to train; {type(self).__name__} "
                "needs heads that learn by gradient, such as mh_lightning.MHLinear."
            )
        return heads

    def _check_each_in_one_task(self, class_groups: Sequence[Sequence[int]]) -> None:
        if sum(map(len, class_groups)) != self.stream.num_classes:
            raise UserError(
                f"data.scenario={self.stream.scenario}: {type(self).__name__} has a head for each task, so each class "
                "must belong to one task, those of an earlier fit included; use CI, and new classes."
            )

    @property
    def task_heads(self) -> TaskHeads:
        """The heads that are trained."""
        assert isinstance(self.head, TaskHeads)
        return self.head

    def weights_change_outside_of_steps(self) -> bool:
        """Alignment makes other heads."""
        return self.alignment is not None or super().weights_change_outside_of_steps()

    def head_parameters_to_train(self) -> list[nn.Parameter]:
        """Those of all heads, at any time: the ones without a gradient are not stepped."""
        return list(self.task_heads.parameters())

    def parameter_counts(self) -> dict[str, int]:
        """Without the aligned copy, which is made of the same heads."""
        counts = super().parameter_counts()
        copied = 0 if self.aligned_heads is None else sum(one.numel() for one in self.aligned_heads.parameters())
        return {**counts, "total": counts["total"] - copied}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As in all methods; a run is resumed with the alignment that it began with."""
        configured = super().configure_optimizers()
        if self.alignment is not None:
            options = dataclasses.asdict(self.alignment)
            self.optimizer_settings |= {f"alignment.{name}": str(value) for name, value in options.items()}
        return configured

    def on_task_start(self, task: int) -> None:
        """Predict by the heads in training again."""
        if self.aligned_heads is not None:
            self.aligned_heads.tasks_begun.zero_()

    def on_train_start(self) -> None:
        """A resumed run may go on in the middle of an epoch."""
        self._begin_task()

    def on_train_epoch_start(self) -> None:
        """The trainer may have come to the next task."""
        self._begin_task()

    def _begin_task(self) -> None:
        """Freeze the heads of former tasks; only the current head's keys move."""
        place = self.stream.num_earlier_tasks + self.task
        self.task_heads.begin_task(place)
        current = self.task_heads.heads[place]
        self._memory_heads = [module for module in current.modules() if isinstance(module, MHLinear)]

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy among the classes of the task."""
        x, targets, _ = batch
        task = int(self.task_heads.tasks_begun) - 1
        logits = self.task_heads.logits_of_task(self.features(x), task)
        return self.mean_loss(self.seen_by_loss(logits, targets), targets), logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C) of the aligned heads, or, while a task is learnt, of those in training."""
        logits: Tensor = self._predicting_heads()(self.features(x))
        return logits

    def answering_head(self) -> nn.Module:
        """The heads of the tasks that have begun."""
        return self._predicting_heads().begun()

    def _predicting_heads(self) -> TaskHeads:
        aligned = self.aligned_heads
        return aligned if aligned is not None and bool(aligned.tasks_begun) else self.task_heads

    def on_task_end(self, task: int) -> None:
        """Gather the task's classes, and align a copy of the heads."""
        if self.alignment is None:
            return
        assert self.aligned_heads is not None and self.class_gaussians is not None
        features = features_of_task(self, task, "Class statistics")
        self.class_gaussians.gather(self.stream.class_groups[task], features)
        place = self.stream.num_earlier_tasks + task
        if place == 0:
            return
        aligned = copy.deepcopy(self.task_heads)
        seed = seed_from(place)
        self.alignment.align(aligned, self.class_gaussians, seed, quiet=not shows_progress(self.trainer))
        self.aligned_heads.load_state_dict(aligned.state_dict())
