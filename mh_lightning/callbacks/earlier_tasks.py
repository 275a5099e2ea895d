"""How well a run that goes on still knows what earlier runs had learnt, on their test data."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from mh_lightning.callbacks.run import current_task, is_fitting
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError


class EarlierTasks(Callback):
    """At each evaluation of a fit that goes on, also measures the tasks of the fits before it.

    Their accuracies stand in results.json, in the rows of this run of ``parent.accuracy_matrix_of_both``, where there
    would be null otherwise, and in the loggers as ``earlier/average_accuracy``. In a configuration::

        trainer:
          callbacks:
          - class_path: mh_lightning.callbacks.EarlierTasks
            init_args:
              streams:
              - class_path: ImageFolder
                init_args: {root: images/old, increment: [3, 2, 2]}

    Args:
        streams: of all earlier fits, first to last, with the tasks that they had. Their training samples are read and
            not used, so that in a folder of images ``train`` may be a link to ``test``.

    Raises:
        UserError: if the streams do not have the tasks of the earlier fits, or the fit does not go on.
    """

    def __init__(self, streams: Sequence[StreamDataModule]) -> None:
        self.streams = [streams] if isinstance(streams, StreamDataModule) else list(streams)
        self.accuracies: dict[int, list[float]] = {}  # of all earlier tasks, after each task that was evaluated
        self._counts: list[Tensor] = []  # of this rank, of the evaluation that runs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the streams, whose classes the model knows by their names."""
        learnt: LearntStream | None = getattr(pl_module, "learnt_stream", None)
        if learnt is None:
            raise UserError("EarlierTasks: this fit goes on with no earlier one; give continue_from, or leave it out.")
        for stream in self.streams:
            stream.trainer = trainer
            stream.go_on_from(learnt)
            stream.setup("test")
            unknown = stream.class_names[learnt.num_classes :]
            if unknown:
                raise UserError(f"EarlierTasks: the model has not learnt the class {unknown[0]!r} of streams.")
        tasks = [group for stream in self.streams for group in stream.class_groups]
        if tasks != learnt.class_groups:
            raise UserError(
                f"EarlierTasks: the model has learnt tasks of classes {learnt.class_groups}, and streams have {tasks}; "
                "give those of all earlier fits in their order, with the options they had."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the model that is evaluated, as other callbacks have prepared it (averages of weights)."""
        if is_fitting(trainer) and batch_idx == dataloader_idx == 0:
            self._counts = [_counts(trainer, pl_module, stream) for stream in self.streams]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was found."""
        if not is_fitting(trainer):
            return
        if not self._counts:  # on a rank that has no sample to evaluate
            self._counts = [_counts(trainer, pl_module, stream) for stream in self.streams]
        correct, total = sum_over_ranks(torch.cat(self._counts, dim=1)).cpu().double()
        self._counts = []
        task = current_task(trainer)
        self.accuracies[task] = (correct / total).tolist()
        mean = float((correct / total).mean())
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("earlier/average_accuracy", mean, task + 1)
            else:
                logger.log_metrics({"earlier/average_accuracy": mean}, trainer.global_step)
        pl_module.print(f"After task {task + 1}: average accuracy on the tasks of before {mean:.3f}")

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"accuracies": self.accuracies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.accuracies = dict(state_dict["accuracies"])


@torch.no_grad()
def _counts(trainer: Trainer, method: Any, stream: StreamDataModule) -> Tensor:
    """Samples of each task of a stream that are classified correctly, and all of them, on this rank, (2, T)."""
    counts = torch.zeros(2, stream.num_tasks, dtype=torch.long, device=method.device)
    plugin = trainer.precision_plugin
    (loader,) = stream.test_dataloader()
    with method.evaluating(), method.taking_features(stream.feature_cache is not None):
        for batch in loader:
            x, targets, tasks = plugin.convert_input([part.to(method.device) for part in batch])
            with plugin.forward_context():
                correct = method(x).argmax(dim=1) == targets
            counts.index_add_(1, tasks, torch.stack([correct, torch.ones_like(correct)]).long())
    return counts
