"""What every method shares, and what one overrides: how a batch is learnt, and what happens between tasks."""

from typing import Any, Literal, Self, TypedDict

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from mh_lightning.compat.lightning_names import writes_curves
from mh_lightning.distributed import gather_rows, sum_over_ranks, world_size
from mh_lightning.errors import UserError
from mh_lightning.losses import among_classes
from mh_lightning.methods.checkpoint_checks import tell_of_state_that_is_lost
from mh_lightning.methods.checkpointed import Head
from mh_lightning.methods.frame import Batch, Evaluation, MethodFrame
from mh_lightning.methods.steps import OptimizerStep, bare_step, count_optimizer_steps

__all__ = ["Batch", "ContinualMethod", "Evaluation", "Head", "Learnt"]


class Learnt(TypedDict, total=False):
    """What a training step hands to the trainer and to the callbacks."""

    loss: Tensor  # to be back-propagated; absent where the method has done so
    correct: Tensor  # (b,) whether each sample was classified correctly before it was learnt


class ContinualMethod(MethodFrame):
    """A backbone and a head that learn a stream of tasks.

    Methods override what they do differently: `training_loss`, `on_task_start`, `on_task_end`, and more rarely what
    stands below these. They see the stream as `self.stream`, a `mh_lightning.data.StreamDataModule`. The rules:

    - Inputs pass through the backbone by `self.features(x)`, never by `self.backbone(x)`: with a feature cache, inputs
      are features already.
    - Several processes learn as one does, from the same global batches: each has its share of them, which may be empty,
      and takes losses by `mean_loss`. What one process decides all must, so random numbers that concern the stream come
      from a generator that is the same on all ranks.
    - All state is in modules, parameters and buffers, which checkpoints hold. A method may make modules and buffers
      while it trains, such as a teacher after the first task: they are saved, and come back for `test`, `predict` and a
      resumed fit. Buffers come back by themselves; of modules `make_module` makes the empty form. What is made later is
      not trained by the optimizer.
    - Checkpoints also hold optimizers, schedulers, random generators and the place in the stream, and no more; plain
      attributes, such as a counter, start anew.

    The head is made once the data module knows the number of classes, before the fit, and covers all of them. Keys of
    Memory Heads move once for each optimizer step, whatever the number of micro-batches accumulated for it. With the
    data module's `chunk_size`, one training step learns a whole chunk of the stream, batch after batch, with a bare
    optimizer: the same result without the trainer's cost for each batch.

    Args:
        backbone: maps inputs to features; a plain module becomes a `mh_lightning.backbones.ModuleBackbone`.
        head: makes the head from the numbers of features and of classes: a class such as `mh_lightning.MHLinear`, or
            any function.
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

    Attributes:
        needs_task_borders: whether the method must be told where tasks begin and end, so that it refuses a stream that
            does not tell; by default it must if it has an `on_task_start` or `on_task_end` of its own.

    Raises:
        UserError: if an option cannot be used.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Note whether a method has hooks for the borders of tasks."""
        super().__init_subclass__(**options)
        if "needs_task_borders" not in vars(cls) and vars(cls).keys() & {"on_task_start", "on_task_end"}:
            cls.needs_task_borders = True

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Literal["cross_entropy", "hinge"] = "cross_entropy",
        classes_in_loss: Literal["all", "task", "batch"] = "all",
        reset_optimizer: bool = False,
        only_touched_units: bool = False,
    ) -> None:
        super().__init__(backbone, head, optimizer, lr_scheduler, loss, reset_optimizer, only_touched_units)
        if classes_in_loss not in ("all", "task", "batch"):
            raise UserError(
                f"model.init_args.classes_in_loss must be 'all', 'task' or 'batch', got {classes_in_loss!r}."
            )
        self.classes_in_loss = classes_in_loss

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **given: Any) -> Self:  # type: ignore[override]
        """The trained method, in evaluation mode and without trainer and data; see `mh_lightning.load`.

        Args:
            checkpoint_path: of a checkpoint, or a run folder.
            map_location: device.
            given: `backbone`, `head` and `trust`, as in `mh_lightning.load`.

        Raises:
            UserError: if it cannot be loaded, or is another method.
        """
        from mh_lightning.inference import load  # which builds on methods

        found = load(checkpoint_path, device=map_location or "cpu", **given).method
        if not isinstance(found, cls):
            raise UserError(f"from: the checkpoint holds a {type(found).__name__}, which is no {cls.__name__}.")
        return found

    # --- the parts that methods override, the first ones first

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss that a batch of the stream is learnt by, and the batch's logits (b, C). Called once a batch, on all
        ranks. A rank's batch may be empty; see `mean_loss`.
        """
        x, targets, _ = batch
        logits = self(x)
        return self.mean_loss(self.seen_by_loss(logits, targets), targets), logits

    def on_task_start(self, task: int) -> None:
        """Called before the first epoch of a task, counted from 0."""

    def on_task_end(self, task: int) -> None:
        """Called after the last batch of a task, before it is evaluated."""

    def make_module(self, name: str) -> nn.Module:
        """A module that the method makes while it trains, as it is before a checkpoint fills it.

        Args:
            name: the attribute that holds it.

        Raises:
            UserError: if the method makes no such module.
        """
        raise UserError(
            f"ckpt_path: the checkpoint holds a module {name!r}, and {type(self).__name__}.make_module makes none of "
            "that name to fill; define it, or use the configuration that the checkpoint was trained with."
        )

    def make_head(self) -> nn.Module:
        """The head for all classes of the stream."""
        return self._make_head(self.backbone.num_features, self.stream.num_classes)

    def head_parameters_to_train(self) -> list[nn.Parameter]:
        """What the optimizer trains besides the backbone's parameters: by default, all that has a gradient.

        It must be the same list at all times of a run, as soon as the head is made: a resumed optimizer finds the state
        of its parameters by their places.
        """
        born = {*self._modules} - self._modules_of_start if self._modules_of_start else set()
        left = {id(one) for name in ("backbone", *born) for one in getattr(self, name).parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in left]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn of state that no checkpoint would bring back, unless a method saves more by itself."""
        super().on_save_checkpoint(checkpoint)
        if type(self).on_save_checkpoint is ContinualMethod.on_save_checkpoint:
            makes_modules = type(self).make_module is not ContinualMethod.make_module
            born = set() if makes_modules else {*self._modules} - self._modules_of_start
            tell_of_state_that_is_lost(self, sorted(born))

    def adjust_gradients(self) -> None:
        """Called when the gradients of an optimizer step are complete."""

    # --- what they use

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
        return self.mean_over_samples(self.losses(logits, targets), rows)

    def mean_over_samples(self, losses: Tensor, rows: int | None = None) -> Tensor:
        """The same of losses (b,) of one's own."""
        if world_size() == 1:
            return losses.mean()
        whole = self.rows_of_batch if rows is None else rows
        return losses.sum() * (world_size() / whole)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer steps, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def classes_until(self, task: int) -> list[int]:
        """The classes of the tasks before one, those of earlier fits included."""
        known = self.stream.learnt().class_groups[: self.stream.num_earlier_tasks + task]
        return sorted({label for group in known for label in group})

    def seen_by_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (b, C) of new samples, minus infinity where `classes_in_loss` leaves a class out."""
        if self.classes_in_loss == "all":
            return logits
        if self.classes_in_loss == "batch":
            return among_classes(logits, gather_rows(targets)[0])
        task = self.stream.tasks[self.task]
        return among_classes(logits, torch.tensor(task.classes, device=logits.device))

    def log_training(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Draw training curves of the global batch, and tell which samples (b,) of this rank were classified correctly.

        To log takes longer than a small step, so it is done at each `trainer.log_every_n_steps`-th and at the last of
        an epoch. A loss that is not finite is told then, too; on a CPU, where nothing waits for it, at once.

        Args:
            loss: such that its mean over ranks is that of the global batch, as from `mean_loss`.
            logits: (b, C).
            targets: classes, (b,).

        Raises:
            UserError: on all ranks, if the loss is not finite.
        """
        correct = logits.argmax(dim=1) == targets
        loss = loss.detach()
        logs = self.trainer.is_last_batch or writes_curves(self.trainer)
        if not logs and loss.device.type != "cpu":
            return correct
        if world_size() == 1:
            accuracy = correct.float().mean()
        else:
            loss, hits = sum_over_ranks(torch.stack([loss, correct.sum().to(loss.dtype)])).unbind()
            loss, accuracy = loss / world_size(), hits / self.rows_of_batch
        if not bool(loss.isfinite()):
            raise UserError(
                f"The training loss became {loss.item()} at step {self.global_step}: the features hold NaN "
                "or infinite values, the learning rate (model.init_args.optimizer) is too large, or a loss of the "
                "method's own grows without bound."
            )
        if logs:
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/accuracy", accuracy, prog_bar=True)
        return correct

    @property
    def rows_of_batch(self) -> int:
        """Samples of the stream's batch that is being learnt, over all ranks."""
        return self._rows_of_batches()[self.trainer.fit_loop.batch_idx]

    # --- the step

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """One micro-batch, which the trainer optimizes; or, without its help, one chunk of the stream."""
        if not self.automatic_optimization:
            return self._learn_chunk(batch)
        loss, logits = self.training_loss(batch)
        correct = self.log_training(loss, logits, batch[1])
        return Learnt(loss=loss * self._weight_in_step(batch_idx), correct=correct)

    def _learn_chunk(self, chunk: Batch) -> Learnt:
        """Learn a chunk of the stream in optimizer steps, as the trainer would without its cost for each."""
        optimizer = self.trainer.optimizers[0]
        learn = OptimizerStep(optimizer, bare_step(optimizer), adjust=self.adjust_gradients)
        losses: list[Tensor] = []
        logits: list[Tensor] = []
        for batch in zip(*(torch.split(part, self.stream.batch_size) for part in chunk), strict=True):
            loss, logits_of_batch = self.training_loss(batch)
            learn(loss)
            losses.append(loss.detach())
            logits.append(logits_of_batch.detach())
        count_optimizer_steps(self, len(losses))
        return Learnt(correct=self.log_training(torch.stack(losses).mean(), torch.cat(logits), chunk[1]))

    def _weight_in_step(self, batch_idx: int) -> float:
        """What the mean over a step's micro-batches must weigh this one with to be the mean over its samples."""
        steps = self.trainer.accumulate_grad_batches
        if steps == 1:
            return 1.0
        first = batch_idx // steps * steps
        last = min(first + steps, int(self.trainer.num_training_batches))
        sizes = self._rows_of_batches()[first:last]
        return steps * sizes[batch_idx - first] / sum(sizes)

    def _rows_of_batches(self) -> list[int]:
        loader: Any = self.trainer.train_dataloader
        sizes: list[int] = loader.batch_sampler.sizes
        return sizes
