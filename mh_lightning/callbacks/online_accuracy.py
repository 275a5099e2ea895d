"""Accuracy over the stream: of each sample before it is learnt."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mh_lightning.callbacks.plots import online_accuracy_figure
from mh_lightning.callbacks.run import is_trial, run_folder, show_figure, starts_task
from mh_lightning.distributed import gather_rows


class OnlineAccuracy(Callback):
    """Keeps which samples were classified correctly before they were learnt, in the first epoch of their task
    (test-then-train), and draws the running accuracy over the stream at the end of the fit:
    ``accuracy_over_stream.png``, and in TensorBoard.

    Its state is part of every checkpoint: a byte for each training sample so far.
    """

    def __init__(self) -> None:
        self._correct = torch.zeros(0, dtype=torch.uint8)
        self._task_starts: list[int] = []
        self._steps: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep a batch."""
        if starts_task(trainer) and isinstance(outputs, dict) and "correct" in outputs:
            self._steps.append(outputs["correct"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the batches of all ranks in the order of the stream."""
        if not starts_task(trainer):
            return
        self._task_starts.append(len(self._correct))
        steps, self._steps = self._steps, []
        correct = torch.cat(steps) if steps else torch.zeros(0, dtype=torch.bool, device=pl_module.device)
        empty = torch.zeros(0, 2, dtype=torch.long)
        numbers = torch.cat([empty, *(_places(number, len(step)) for number, step in enumerate(steps))])
        correct, numbers = gather_rows(correct, numbers.to(correct.device))
        # samples were dealt out to the ranks in turn: first by step, then by place, then by rank
        dealt = numbers[:, 1].argsort(stable=True)
        in_order = correct[dealt[numbers[dealt, 0].argsort(stable=True)]]
        self._correct = torch.cat([self._correct, in_order.to("cpu", torch.uint8)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if len(self._correct) and not is_trial(trainer):
            figure = online_accuracy_figure(self._correct.numpy(), self._task_starts)
            show_figure(trainer, "train/accuracy_over_stream", figure, run_folder(trainer) / "accuracy_over_stream.png")

    def state_dict(self) -> dict[str, Any]:
        """What was kept so far."""
        return {"correct": self._correct, "task_starts": self._task_starts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._correct, self._task_starts = state_dict["correct"], list(state_dict["task_starts"])


def _places(step: int, samples: int) -> Tensor:
    """The step and the place in it of each sample, (samples, 2)."""
    return torch.stack([torch.full((samples,), step), torch.arange(samples)], dim=1)
