"""What carries a method through a trainer's stages: its parts are made, stepped, evaluated, saved and compared."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal, TypedDict

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from mh_lightning.backbones import Backbone, as_backbone
from mh_lightning.backbones.base import check_features
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.distributed import broadcast_from_first_rank, state_kept_alike, world_size
from mh_lightning.errors import UserError, blame
from mh_lightning.growth import grown
from mh_lightning.layers import MHLinear
from mh_lightning.losses import LOSSES
from mh_lightning.methods.checkpoint_checks import (
    check_optimizer_settings,
    check_optimizer_state,
)
from mh_lightning.methods.checkpointed import Checkpointed, Head
from mh_lightning.methods.optimization import (
    for_trainer,
    gradients_are_finite,
    make_lr_scheduler,
    make_optimizer,
    may_skip_steps,
    settings_to_resume_with,
)
from mh_lightning.methods.steps import complete_gradients
from mh_lightning.methods.trainer_checks import (
    check_borders,
    check_first_sample,
    check_strategy,
    check_trainer,
    check_trainer_of_chunks,
)

Batch = tuple[Tensor, Tensor, Tensor]  # inputs (b, ...), classes (b,), tasks (b,)


class Evaluation(TypedDict):
    """What an evaluation step hands to the callbacks."""

    logits: Tensor  # (b, C)
    targets: Tensor  # (b,)
    tasks: Tensor  # (b,)
    losses: Tensor  # (b,)


class MethodFrame(Checkpointed):
    """A backbone, a head for all classes, their optimizer and their checkpoints.

    Args:
        backbone: maps inputs to features; a plain module becomes a `mh_lightning.backbones.ModuleBackbone`.
        head: makes the head from the numbers of features and of classes.
        optimizer: makes the optimizer.
        lr_scheduler: makes the learning-rate scheduler.
        loss: of a sample, see `mh_lightning.losses`.
        reset_optimizer: start each task with a new optimizer and scheduler.
        only_touched_units: step only the memory units that have a gradient.

    Attributes:
        answers_from_features: whether its answers follow from the backbone's features alone.
    """

    answers_from_features: ClassVar[bool] = True
    needs_task_borders: ClassVar[bool] = False  # see `ContinualMethod`

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        loss: Literal["cross_entropy", "hinge"],
        reset_optimizer: bool,
        only_touched_units: bool,
    ) -> None:
        super().__init__(as_backbone(backbone), head)
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self.loss, self.losses = loss, LOSSES[loss]
        self.reset_optimizer = reset_optimizer
        self.only_touched_units = only_touched_units
        self._memory_heads: list[MHLinear] = []
        self._modules_of_start: frozenset[str] = frozenset()
        self._began_with: tuple[LearntStream | None] | None = None  # of the last fit, what was learnt before

    @cached_property
    def _steps_by_trainer(self) -> bool:
        """Whether the method leaves steps to the trainer, where the stream has no chunks."""
        return self.automatic_optimization

    @abstractmethod
    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `ContinualMethod`."""

    @abstractmethod
    def adjust_gradients(self) -> None:
        """See `ContinualMethod`."""

    @abstractmethod
    def make_head(self) -> nn.Module:
        """See `ContinualMethod`."""

    @property
    def task(self) -> int:
        """The task that is being learnt, from 0."""
        return self.stream.task_of_epoch(self.trainer.current_epoch)

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers the model has in all, and how many of them are trained at some time."""
        trained = [one for one in self.backbone.parameters() if one.requires_grad] + self.head_parameters_to_train()
        return {
            "total": sum(parameter.numel() for parameter in self.parameters()),
            "trainable": sum(parameter.numel() for parameter in trained),
        }

    def configure_callbacks(self) -> list[Callback]:
        """The first that a trainer asks: see that it has what a stream needs, and note the state of torch's generator
        before a distributed strategy sets it back to the seed.
        """
        check_trainer(self.trainer)
        self._settings_of_checkpoint = self._optimizers_of_checkpoint = None
        self.automatic_optimization = self._steps_by_trainer
        if self.trainer.state.fn == "fit":
            check_borders(self, self.stream.announces_tasks)
            if self.learnt_stream is not None and self.learnt_stream.was_cut_short and self.needs_task_borders:
                raise UserError(
                    f"{type(self).__name__}: the run was cut short after task {self.learnt_stream.tasks_begun} of "
                    f"{len(self.learnt_stream.class_groups)}, so it cannot go on with others; resume it with ckpt_path."
                )
            if getattr(self.trainer, "resumes", False) and self._began_with is not None:
                (self.learnt_stream,) = self._began_with  # a run is resumed with the object that began it
            self._began_with = (self.learnt_stream,)
        if self.left_behind and self.goes_on:
            raise UserError(
                f"{type(self).__name__} learns with its {', '.join(self.left_behind)}, which a loaded model does not "
                "have, so it cannot go on; of one run, resume with ckpt_path."
            )
        self.stream.go_on_from(self.learnt_stream)
        self._random_state = torch.get_rng_state()
        return []

    def weights_change_outside_of_steps(self) -> bool:
        """Whether weights are also learnt elsewhere than in the trainer's optimizer steps."""
        return not self.automatic_optimization

    def setup(self, stage: str) -> None:
        """Refuse strategies that would break a method's state."""
        check_strategy(self.trainer.strategy)

    def configure_model(self) -> None:
        """Make the head, once."""
        self._inputs_are_features = self.stream.feature_cache is not None
        if self.stream.chunk_size is not None:
            self.automatic_optimization = False  # not before, or the trainer refuses options in words of its own
        if self.head is None:
            if not self._inputs_are_features:
                self.backbone.prepare(self.stream.first_input())
            if world_size() > 1:
                torch.set_rng_state(self._random_state)  # so that the head is the same as in one process
            # Lightning makes the head on a GPU otherwise, from other random numbers
            with torch.device("cpu"):
                self.make_parts()
            self.note_modules()
        elif self.learnt_stream is not None and self.stream.num_classes > self.learnt_stream.num_classes:
            if not self.goes_on:
                unknown = self.stream.class_names[self.learnt_stream.num_classes]
                raise UserError(f"data: the model has not learnt the class {unknown!r}; leave its samples out.")
            self.grow_parts()
        if self.goes_on:
            self.train()  # a loaded model is in evaluation mode

    def note_modules(self) -> None:
        """Remember what is there at the start: what is made later is not trained."""
        self._modules_of_start = frozenset(self._modules)

    def make_parts(self) -> None:
        """Make the head, from the classes of the stream."""
        with blame("model.init_args.head"):
            self.head = self.make_head()

    def grow_parts(self) -> None:
        """Make room for classes of the stream that the model has not learnt, in what `make_parts` made."""
        self.head = grown(self.head, self.stream.num_classes)

    def teardown(self, stage: str) -> None:
        """Without the stream, inputs are what the backbone takes; and what was learnt is known by its names."""
        self.leave_stream()
        has_learnt = stage == "fit" and self.head is not None and self.trainer.current_epoch > 0
        if has_learnt and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            learnt = self.stream.learnt()
            self.learnt_stream = learnt._replace(epochs=learnt.epochs - 1)  # the trainer has counted the last one
            self.parent = {}

    def leave_stream(self) -> None:
        """Take images again where the stream gave features; the trainer's hooks call it however a run ends."""
        self._inputs_are_features = False

    def memory_heads(self) -> dict[str, MHLinear]:
        """All Memory Head layers, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MHLinear)}

    @contextmanager
    def taking_features(self, features: bool = True) -> Iterator[None]:
        """Inputs are features for a while, or what the backbone takes."""
        before, self._inputs_are_features = self._inputs_are_features, features
        try:
            yield
        finally:
            self._inputs_are_features = before

    def features(self, x: Tensor, backbone: Backbone | None = None) -> Tensor:
        """Features (b, num_features) of a batch of inputs, of which there may be none, and which are features already
        where the stream keeps them.

        Args:
            x: (b, ...), what the stream gives.
            backbone: by default the method's own, or a copy of it.
        """
        if self._inputs_are_features:
            return x
        backbone = self.backbone if backbone is None else backbone
        features = _no_features(x, backbone) if len(x) == 0 else backbone(x)
        return check_features(features, len(x), backbone.num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C) of a batch of inputs."""
        assert self.head is not None, "the head is made when a trainer runs the method"
        logits: Tensor = self.head(self.features(x))
        return logits

    def answering_head(self) -> nn.Module:
        """What maps features to logits now, as a module whose graph can be recorded.

        Raises:
            UserError: if the method answers in a way of its own.
        """
        assert self.head is not None, "the head is made when a trainer runs the method"
        if type(self).forward is not MethodFrame.forward:
            name = type(self).__name__
            raise UserError(f"{name} has a forward of its own; define {name}.answering_head, which maps features to "
                            "logits, to export it.")  # fmt: skip
        return self.head

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, and the scheduler if there is one."""
        with blame("model.init_args.optimizer"):
            optimizer = self._new_optimizer()
        scheduler = None
        if self._make_lr_scheduler is not None:
            with blame("model.init_args.lr_scheduler"):
                scheduler = make_lr_scheduler(self._make_lr_scheduler, optimizer)
        self.optimizer_settings = settings_to_resume_with(self, optimizer, scheduler)
        optimizer.register_load_state_dict_pre_hook(check_optimizer_state)
        return for_trainer(optimizer, scheduler)

    def _new_optimizer(self) -> Optimizer:
        return make_optimizer(self._make_optimizer, self)

    def on_train_epoch_end(self) -> None:
        """Step the scheduler where the trainer leaves that to the method."""
        if self.automatic_optimization or self._make_lr_scheduler is None:
            return
        for config in self.trainer.lr_scheduler_configs:
            with blame("model.init_args.lr_scheduler"):
                config.scheduler.step()  # type: ignore[call-arg]

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler for the trainer.

        Raises:
            UserError: if its options turn out to be wrong only now.
        """
        with blame("model.init_args.lr_scheduler"):
            super().lr_scheduler_step(scheduler, metric)

    def _evaluate(self, batch: Batch) -> Evaluation:
        x, targets, tasks = batch
        logits = self(x)
        if not bool(logits.isfinite().all()):
            raise UserError(
                "The model's outputs hold NaN or infinite values; check the weights of the checkpoint and of "
                "model.init_args.backbone, and the learning rate where there is one."
            )
        return Evaluation(
            logits=logits,
            targets=targets,
            tasks=tasks,
            losses=self.losses(logits.float(), targets),
        )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate a batch; callbacks make the metrics."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate a batch; callbacks make the metrics."""
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities (b, C)."""
        return torch.softmax(self(batch[0]).float(), dim=1)

    def on_fit_start(self) -> None:
        """Let Memory Heads collect their updates until the optimizer steps, and all ranks start from one state.

        Raises:
            UserError: on resuming with other settings of the optimizer, which the checkpoint's would silently replace.
        """
        if self._optimizers_of_checkpoint not in (None, len(self.trainer.optimizers)):
            raise UserError(
                f"ckpt_path: the checkpoint holds the state of {self._optimizers_of_checkpoint} optimizers, the run "
                f"has {len(self.trainer.optimizers)}; use the configuration it was trained with."
            )
        check_optimizer_settings(self._settings_of_checkpoint, self.optimizer_settings)
        broadcast_from_first_rank(value for _, value in state_kept_alike(self))
        check_first_sample(self)
        if self.stream.chunk_size is not None:
            check_trainer_of_chunks(self.trainer)
        if not self.automatic_optimization:
            return
        self._memory_heads = list(self.memory_heads().values())
        for layer in self._memory_heads:
            layer.defer_key_updates = True

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel, which asks for it by this name, shall not send around at each step."""
        return [name for name, _ in state_kept_alike(self)]

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, as DistributedDataParallel does at each step, so that all evaluate the
        same model: averages of BatchNorm were moved by each rank's own samples since.
        """
        kept = {id(value) for _, value in state_kept_alike(self)}
        broadcast_from_first_rank(buffer for buffer in self.buffers() if id(buffer) not in kept)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """All modules in evaluation mode, so that a forward leaves no trace in them."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Update keys and counters from all micro-batches of this step, as if they had been one batch; unless the step
        is going to be skipped, or refused, for a gradient that is not finite.
        """
        skipped = bool(self._memory_heads) and may_skip_steps(self) and not gradients_are_finite(optimizer)
        complete_gradients(self._memory_heads, self.adjust_gradients, skipped)

    def on_fit_end(self) -> None:
        """Hand Memory Heads back as plain layers."""
        for layer in self.memory_heads().values():
            layer.defer_key_updates = False


def _no_features(x: Tensor, backbone: Backbone) -> Tensor:
    """Features of no sample, through which the backbone's gradients are zero. Not every backbone takes an empty batch,
    and the averages of BatchNorm must not see it.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()):
        return backbone(x)  # type: ignore[no-any-return]  # other ranks wait for this one there
    zeros = x.new_zeros(0, backbone.num_features)
    return sum((one.sum() for one in backbone.parameters() if one.requires_grad), start=zeros)
