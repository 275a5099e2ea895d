"""How well a run that goes on still knows what earlier runs had learnt, on their test data."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mh_lightning.callbacks.run import current_task, is_fitting
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError
from mh_lightning.methods.base import ContinualMethod


class EarlierTasks(Callback):
    """At each evaluation of a fit that goes on, also measures the tasks of the fits before it.

    Their accuracies stand in results.json, in the rows of this run of ``parent.accuracy_matrix_of_both``, where there
    would be null otherwise, and in the loggers as ``earlier/average_accuracy``.

    Args:
        streams: of all earlier fits, first to last, with the tasks that they had; only their test samples are used.

    Raises:
        UserError: if the streams do not have the tasks of the earlier fits, or the fit does not go on.
    """

    def __init__(self, streams: Sequence[StreamDataModule]) -> None:
        self.streams = list(streams)
        self.accuracies: dict[int, list[float]] = {}  # of all earlier tasks, after each task that was evaluated

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the streams, whose classes the model knows by their names."""
        learnt = pl_module.learnt_stream if isinstance(pl_module, ContinualMethod) else None
        if learnt is None:
            raise UserError("EarlierTasks: this fit goes on with no earlier one; give continue_from, or leave it out.")
        for stream in self.streams:
            stream.trainer = trainer
            stream.go_on_from(learnt)
            stream.setup("test")
            unknown = stream.class_names[learnt.num_classes :]
            if unknown:
                raise UserError(f"EarlierTasks: the model has not learnt the class {unknown[0]!r} of streams.")
        tasks = [stream.num_tasks for stream in self.streams]
        if sum(tasks) != len(learnt.class_groups):
            raise UserError(
                f"EarlierTasks: the model has learnt {len(learnt.class_groups)} tasks, and streams have {tasks}; give "
                "those of all earlier fits, with the options they had."
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        if not is_fitting(trainer):
            return
        method: Any = pl_module
        found = [value for stream in self.streams for value in _accuracies(trainer, method, stream)]
        task = current_task(trainer)
        self.accuracies[task] = found
        mean = sum(found) / len(found)
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
def _accuracies(trainer: Trainer, method: ContinualMethod, stream: StreamDataModule) -> list[float]:
    """Accuracy on the test samples of each task of a stream, over all ranks."""
    counts = torch.zeros(2, stream.num_tasks, dtype=torch.long, device=method.device)  # correct, all
    plugin = trainer.precision_plugin
    (loader,) = stream.test_dataloader()
    with method.evaluating(), method.taking_features(stream.feature_cache is not None):
        for batch in loader:
            x, targets, tasks = plugin.convert_input([part.to(method.device) for part in batch])
            with plugin.forward_context():
                correct = method(x).argmax(dim=1) == targets
            counts.index_add_(1, tasks, torch.stack([correct, torch.ones_like(correct)]).long())
    correct_of_tasks, all_of_tasks = sum_over_ranks(counts).cpu().double()
    return (correct_of_tasks / all_of_tasks).tolist()  # type: ignore[no-any-return]
