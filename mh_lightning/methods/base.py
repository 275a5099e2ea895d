"""What every method shares: a backbone, a head for all classes, and one optimizer step after another over a stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from mh_lightning.backbones import as_backbone
from mh_lightning.backbones.base import check_features
from mh_lightning.distributed import (
    broadcast_from_first_rank,
    gather_rows,
    state_kept_alike,
    sum_over_ranks,
    world_size,
)
from mh_lightning.errors import UserError, blame
from mh_lightning.layers import MHLinear
from mh_lightning.losses import LOSSES, among_classes
from mh_lightning.methods.checks import (
    check_complete,
    check_first_sample,
    check_kept_features,
    check_optimizer_settings,
    check_optimizer_state,
    check_state,
    check_strategy,
    check_trainer,
    check_trainer_options,
    trainer_options,
)
from mh_lightning.methods.chunks import check_trainer_of_chunks, learn_chunk
from mh_lightning.methods.optimization import (
    for_trainer,
    gradients_are_finite,
    make_lr_scheduler,
    make_optimizer,
    may_skip_steps,
    settings_to_resume_with,
)

Batch = tuple[Tensor, Tensor, Tensor]  # inputs (b, ...), classes (b,), tasks (b,)


class Learnt(TypedDict, total=False):
    """What a training step hands to the trainer and to the callbacks."""

    loss: Tensor  # to be back-propagated; absent where the method has done so
    correct: Tensor  # (b,) whether each sample was classified correctly before it was learnt


class Evaluation(TypedDict):
    """What an evaluation step hands to the callbacks."""

    logits: Tensor  # (b, C)
    targets: Tensor  # (b,)
    tasks: Tensor  # (b,)
    losses: Tensor  # (b,)


class ContinualMethod(LightningModule):
    """A backbone and a head that learn a stream of tasks. Methods override what they do differently.

    The head is made once the data module knows the number of classes, before the fit, and covers all of them. Keys of
    Memory Heads move once for each optimizer step, whatever the number of micro-batches accumulated for it.

    With the data module's `chunk_size`, one training step learns a whole chunk of the stream, batch after batch, with a
    bare optimizer: the same result without the trainer's cost for each batch.

    Several processes learn as one does, from the same global batches: each has its share of them, which may be empty,
    and takes the losses by `mean_loss`.

    Args:
        backbone: maps inputs to features; a plain module becomes a `mh_lightning.backbones.ModuleBackbone`.
        head: makes the head from the numbers of features and of classes.
        optimizer: makes the optimizer from the trainable parameters. A backbone may have a learning rate and a weight
            decay of its own, see `mh_lightning.backbones.TimmBackbone`.
        lr_scheduler: makes the learning-rate scheduler, stepped once an epoch, from the optimizer.
        loss: of a sample, "cross_entropy" or "hinge"; see `mh_lightning.losses`.
        classes_in_loss: whose logits the loss of a new sample sees: "all", those of the current "task", or those of
            the current "batch" over all devices. Logits of classes that are not there then are not pushed down (Caccia
            et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022).
            Replayed samples always see all classes.
        reset_optimizer: start each task with a new optimizer and scheduler.
        only_touched_units: step only the memory units that have a gradient, see
            `mh_lightning.memory_head_optimizer`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Callable[[int, int], nn.Module],
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Literal["cross_entropy", "hinge"] = "cross_entropy",
        classes_in_loss: Literal["all", "task", "batch"] = "all",
        reset_optimizer: bool = False,
        only_touched_units: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = as_backbone(backbone)
        self.head: nn.Module | None = None
        self._make_head = head
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        if classes_in_loss not in ("all", "task", "batch"):
            raise UserError(
                f"model.init_args.classes_in_loss must be 'all', 'task' or 'batch', got {classes_in_loss!r}."
            )
        self.losses, self.classes_in_loss = LOSSES[loss], classes_in_loss
        self.reset_optimizer = reset_optimizer
        self.only_touched_units = only_touched_units
        self.optimizer_settings: dict[str, str] = {}
        self._settings_of_checkpoint: dict[str, str] | None = None
        self._optimizers_of_checkpoint: int | None = None
        self._memory_heads: list[MHLinear] = []
        self._inputs_are_features = False

    # --- the parts that methods override

    def on_task_start(self, task: int) -> None:
        """Called before the first epoch of a task, counted from 0."""

    def on_task_end(self, task: int) -> None:
        """Called after the last batch of a task, before it is evaluated."""

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss that a batch of the stream is learnt by, and the batch's logits (b, C). Called once a batch, on all
        ranks. A rank's batch may be empty; see `mean_loss`.
        """
        x, targets, _ = batch
        logits = self(x)
        return self.mean_loss(self.seen_by_loss(logits, targets), targets), logits

    def mean_loss(self, logits: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
        """The mean loss of samples that are shared among ranks, as far as it is this rank's: such that the mean over
        ranks of it, and of its gradients, is that of the mean over all samples. In one process, the mean.

        Args:
            logits: (b, C), of this rank's samples, of which there may be none.
            targets: classes, (b,).
            rows: samples of all ranks; by default those of the stream's batch.
        """
        if world_size() == 1:
            return self.losses(logits, targets, "mean")
        whole = self.rows_of_batch if rows is None else rows
        return self.losses(logits, targets).sum() * (world_size() / whole)

    @property
    def rows_of_batch(self) -> int:
        """Samples of the stream's batch that is being learnt, over all ranks."""
        return self._rows_of_batches()[self.trainer.fit_loop.batch_idx]

    def _rows_of_batches(self) -> list[int]:
        loader: Any = self.trainer.train_dataloader
        sizes: list[int] = loader.batch_sampler.sizes
        return sizes

    def seen_by_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (b, C) of new samples, minus infinity where `classes_in_loss` leaves a class out."""
        if self.classes_in_loss == "all":
            return logits
        if self.classes_in_loss == "batch":
            return among_classes(logits, gather_rows(targets)[0])
        task = self._stream.tasks[self._stream.task_of_epoch(self.trainer.current_epoch)]
        return among_classes(logits, torch.tensor(task.classes, device=logits.device))

    def make_head(self) -> nn.Module:
        """The head for all classes of the stream."""
        return self._make_head(self.backbone.num_features, self._stream.num_classes)

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers the model has in all, and how many of them are trained at some time."""
        trained = [one for one in self.backbone.parameters() if one.requires_grad] + self.head_parameters_to_train()
        return {
            "total": sum(parameter.numel() for parameter in self.parameters()),
            "trainable": sum(parameter.numel() for parameter in trained),
        }

    def adjust_gradients(self) -> None:
        """Called when the gradients of an optimizer step are complete."""

    def head_parameters_to_train(self) -> list[nn.Parameter]:
        """What the optimizer trains besides the backbone's parameters: by default, all that has a gradient.

        It must be the same list at all times of a run, as soon as the head is made: a resumed optimizer finds the state
        of its parameters by their places.
        """
        backbone = {id(parameter) for parameter in self.backbone.parameters()}
        return [
            parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in backbone
        ]

    # --- the frame

    def configure_callbacks(self) -> list[Callback]:
        """The first that a trainer asks: see that it has what a stream needs, and note the state of torch's generator
        before a distributed strategy sets it back to the seed.
        """
        check_trainer(self.trainer)
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
        self._inputs_are_features = self._stream.feature_cache is not None
        if self._stream.chunk_size is not None:
            self.automatic_optimization = False
        if self.head is None:
            if not self._inputs_are_features:
                self.backbone.prepare(self._stream.first_input())
            if world_size() > 1:
                torch.set_rng_state(self._random_state)  # so that the head is the same as in one process
            # Lightning makes the head on a GPU otherwise, from other random numbers
            with torch.device("cpu"), blame("model.init_args.head"):
                self.head = self.make_head()

    def teardown(self, stage: str) -> None:
        """Without the stream, inputs are what the backbone takes."""
        self.leave_stream()

    def leave_stream(self) -> None:
        """Take images again where the stream gave features; the trainer's hooks call it however a run ends."""
        self._inputs_are_features = False

    @property
    def _stream(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def memory_heads(self) -> dict[str, MHLinear]:
        """All Memory Head layers, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MHLinear)}

    def features(self, x: Tensor) -> Tensor:
        """Features (b, num_features) of a batch of inputs, which are features already where the stream keeps them."""
        if self._inputs_are_features:
            return x
        features = self._no_features(x) if len(x) == 0 else self.backbone(x)
        return check_features(features, len(x), self.backbone.num_features)

    def _no_features(self, x: Tensor) -> Tensor:
        """Features of no sample, through which the backbone's gradients are zero. Not every backbone takes an empty
        batch, and the averages of BatchNorm must not see it.
        """
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.backbone.modules()):
            return self.backbone(x)  # type: ignore[no-any-return]  # other ranks wait for this one there
        zeros = x.new_zeros(0, self.backbone.num_features)
        return sum((one.sum() for one in self.backbone.parameters() if one.requires_grad), start=zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C) of a batch of inputs."""
        assert self.head is not None, "the head is made when a trainer runs the method"
        logits: Tensor = self.head(self.features(x))
        return logits

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

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """One micro-batch, which the trainer optimizes; or, without its help, one chunk of the stream."""
        if not self.automatic_optimization:
            return learn_chunk(self, batch, self._stream.batch_size)
        loss, logits = self.training_loss(batch)
        correct = self.log_training(loss, logits, batch[1])
        return Learnt(loss=loss * self._weight_in_step(batch_idx), correct=correct)

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

    def _weight_in_step(self, batch_idx: int) -> float:
        """What the mean over a step's micro-batches must weigh this one with to be the mean over its samples."""
        steps = self.trainer.accumulate_grad_batches
        if steps == 1:
            return 1.0
        first = batch_idx // steps * steps
        last = min(first + steps, int(self.trainer.num_training_batches))
        sizes = self._rows_of_batches()[first:last]
        return steps * sizes[batch_idx - first] / sum(sizes)

    def log_training(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Draw training curves of the global batch, and tell which samples (b,) of this rank were classified correctly.

        Args:
            loss: such that its mean over ranks is that of the global batch, as from `mean_loss`.
            logits: (b, C).
            targets: classes, (b,).

        Raises:
            UserError: on all ranks, if the loss is not finite.
        """
        correct = logits.argmax(dim=1) == targets
        loss = loss.detach()
        if world_size() == 1:
            accuracy = correct.float().mean()
        else:
            loss, hits = sum_over_ranks(torch.stack([loss, correct.sum().to(loss.dtype)])).unbind()
            loss, accuracy = loss / world_size(), hits / self.rows_of_batch
        if not bool(loss.isfinite()):
            raise UserError(
                f"The training loss became {loss.item()} at step {self.global_step}: the features hold NaN "
                "or infinite values, or the learning rate (model.init_args.optimizer) is too large."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, prog_bar=True)
        return correct

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
        if self._stream.chunk_size is not None:
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
        skipped = self._memory_heads and may_skip_steps(self) and not gradients_are_finite(optimizer)
        for layer in self._memory_heads:
            (layer.drop_key_updates if skipped else layer.apply_key_updates)()
        self.adjust_gradients()

    def on_fit_end(self) -> None:
        """Hand Memory Heads back as plain layers."""
        for layer in self.memory_heads().values():
            layer.defer_key_updates = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which method, backbone, head, optimizer and trainer the state belongs to."""
        checkpoint["architecture"], checkpoint["num_classes"] = self._architecture(), self._stream.num_classes
        checkpoint["trainer_options"] = trainer_options(self.trainer)
        checkpoint["optimizer_settings"] = self.optimizer_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with this model, and where a fit goes on, with its trainer.

        Raises:
            UserError: if the checkpoint belongs to another configuration.
        """
        fitting = self.trainer.state.fn == "fit"
        check_complete(checkpoint, fitting)
        if fitting and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_trainer_options(checkpoint.get("trainer_options"), trainer_options(self.trainer))
        self._settings_of_checkpoint = checkpoint.get("optimizer_settings")
        self._optimizers_of_checkpoint = len(checkpoint.get("optimizer_states") or []) if fitting else None
        check_state(checkpoint, self._architecture(), self._stream.num_classes, self.state_dict())
        if self._inputs_are_features:
            check_kept_features(checkpoint["state_dict"], self.backbone)

    def _architecture(self) -> str:
        parts = [type(self).__name__, type(self.backbone).__name__]
        if hasattr(self.backbone, "name"):
            parts.append(str(self.backbone.name))
        return "/".join([*parts, type(self.head).__name__])
