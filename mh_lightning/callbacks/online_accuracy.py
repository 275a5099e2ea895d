"""Accuracy over the stream: of each sample before it is learnt."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mh_lightning.callbacks.plots import online_accuracy_figure
from mh_lightning.callbacks.run import is_trial, run_folder, show_figure, starts_task
from mh_lightning.distributed import gather_rows

PENDING_STEPS = 1000  # kept apart, one small tensor each, before they go into the buffer


class OnlineAccuracy(Callback):
    """Keeps which samples were classified correctly before they were learnt, in the first epoch of their task
    (test-then-train), and draws the running accuracy over the stream at the end of the fit:
    ``accuracy_over_stream.png``, and in TensorBoard.

    Its state is part of every checkpoint, whole after any step: a byte for each training sample so far.
    """

    def __init__(self) -> None:
        self._buffer = torch.zeros(1024, dtype=torch.uint8)  # of which the first `_samples` are filled
        self._samples = 0
        self._task_starts: list[int] = []
        self._pending: list[Tensor] = []  # of this rank, one a step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a task starts; the trainer does not call this where a resumed run goes on inside an epoch."""
        if starts_task(trainer):
            self._flush()
            self._task_starts.append(self._samples)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep a batch."""
        if starts_task(trainer) and isinstance(outputs, dict) and "correct" in outputs:
            self._pending.append(outputs["correct"])
            if len(self._pending) >= PENDING_STEPS:
                self._flush()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing pending."""
        self._flush()

    def _flush(self) -> None:
        """Append the pending steps of all ranks in the order of the stream. All ranks call it after the same step."""
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        correct = torch.cat(steps)
        # a global batch is dealt out to the ranks in turn: by step, then place in the rank's batch, then rank
        places = torch.cat([torch.arange(len(step)) + (number << 32) for number, step in enumerate(steps)])
        correct, places = gather_rows(correct, places.to(correct.device))
        in_order = correct[places.argsort(stable=True)].to("cpu", torch.uint8)
        samples = self._samples + len(in_order)
        if samples > len(self._buffer):
            kept = self._correct
            self._buffer = torch.zeros(max(samples, 2 * len(self._buffer)), dtype=torch.uint8)
            self._buffer[: len(kept)] = kept
        self._buffer[self._samples : samples] = in_order
        self._samples = samples

    @property
    def _correct(self) -> Tensor:
        return self._buffer[: self._samples]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._samples and not is_trial(trainer):
            figure = online_accuracy_figure(self._correct.numpy(), self._task_starts)
            show_figure(trainer, "train/accuracy_over_stream", figure, run_folder(trainer) / "accuracy_over_stream.png")

    def state_dict(self) -> dict[str, Any]:
        """What was kept so far, the same on all ranks, which must call it together."""
        self._flush()
        return {"correct": self._correct.clone(), "task_starts": list(self._task_starts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._buffer, self._task_starts = state_dict["correct"].clone(), list(state_dict["task_starts"])
        self._samples, self._pending = len(self._buffer), []
