"""What methods share that learn anew at the end of each task."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mh_lightning.distributed import broadcast_from_first_rank, world_size
from mh_lightning.errors import UserError, require
from mh_lightning.methods.base import Batch, ContinualMethod, Head, Learnt
from mh_lightning.methods.steps import OptimizerStep


class RetrainingMethod(ContinualMethod):
    """A method that only looks at the stream, and at the end of each task learns from scratch: from the weights that
    the run started with, with a new optimizer, without a scheduler. Subclasses define `batches`.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        epochs: at least 1 pass over what is learnt at the end of a task.
        options: of `ContinualMethod`.
    """

    needs_task_borders = False  # what it does at the end of a task is for the evaluation that follows

    def __init__(self, backbone: nn.Module, head: Head, *, epochs: int = 10, **options: Any) -> None:
        super().__init__(backbone, head, **options)
        if self._make_lr_scheduler is not None:
            raise UserError(
                f"model.init_args.lr_scheduler: {type(self).__name__} learns anew after each task, without a "
                "scheduler; leave it out."
            )
        if self.classes_in_loss != "all":
            raise UserError(
                f"model.init_args.classes_in_loss={self.classes_in_loss}: {type(self).__name__} learns all classes "
                "together; leave it out."
            )
        require("model.init_args.epochs", epochs, at_least=1, whole=True)
        self.epochs = epochs
        self.automatic_optimization = False
        self._initial_weights: dict[str, Tensor] = {}

    @abstractmethod
    def batches(self, task: int, epoch: int) -> Iterable[tuple[Batch, int]]:
        """The batches of an epoch after a task: this rank's share, which may be empty, and the rows of the whole."""

    def configure_model(self) -> None:
        """Make the head, and keep the weights to start from; those of the head are new ones if a fit goes on.

        Raises:
            UserError: if it goes on with a trained backbone, whose first weights are not kept.
        """
        super().configure_model()
        if self.goes_on and _learns(self.backbone):
            raise UserError(
                f"{type(self).__name__} learns anew after each task, from the weights that its run began with, which "
                "are not kept of a backbone; so it cannot go on, unless the backbone is frozen."
            )
        if not self._initial_weights or self.goes_on:
            with torch.device("cpu"):  # where the first head was made, too
                starts = {"backbone": self.backbone, "head": self.make_head() if self.goes_on else self.head}
            self._initial_weights = {
                f"{part}.{name}": value.detach().clone()
                for part, module in starts.items()
                if module is not None and _learns(module)
                for name, value in module.state_dict().items()
                if isinstance(value, Tensor)
            }

    def on_fit_start(self) -> None:
        """Refuse a precision whose gradients the trainer would have to scale."""
        if self.trainer.precision == "16-mixed":
            raise UserError(
                f"trainer.precision=16-mixed: {type(self).__name__} learns without the trainer's scaling of gradients; "
                "use bf16-mixed."
            )
        self._initial_weights = {name: value.to(self.device) for name, value in self._initial_weights.items()}
        broadcast_from_first_rank(self._initial_weights.values())
        super().on_fit_start()

    def training_step(self, batch: Batch, batch_idx: int) -> Learnt:
        """Classify, for the curves."""
        x, targets, _ = batch
        with torch.no_grad(), self.evaluating():
            logits = self(x)
        return Learnt(correct=self.log_training(self.mean_loss(logits, targets), logits, targets))

    def on_task_end(self, task: int) -> None:
        """Learn from scratch."""
        self.load_state_dict(self._initial_weights, strict=False)
        optimizer = self._new_optimizer()
        heads = list(self.memory_heads().values())
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        learn = OptimizerStep(optimizer, optimizer.step, heads, shared=trained, share=1 / world_size())
        for layer in heads:
            layer.defer_key_updates = True
        quiet = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        with torch.enable_grad():
            for epoch in tqdm(
                range(self.epochs), desc=f"After task {task + 1}", unit="epoch", leave=False, disable=quiet
            ):
                for batch, rows in self.batches(task, epoch):
                    x, targets, _ = self.trainer.precision_plugin.convert_input(
                        [part.to(self.device) for part in batch]
                    )
                    with self.trainer.precision_plugin.forward_context():
                        loss = self.mean_loss(self(x), targets, rows)
                    learn(loss)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
