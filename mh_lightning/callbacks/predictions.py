"""Predictions in a file."""

import csv
import io
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mh_lightning.callbacks.run import refuse_to_overwrite, run_folder, stream_of
from mh_lightning.distributed import gather_rows
from mh_lightning.errors import write_at_once

PREDICTIONS = "predictions.csv"


class PredictionWriter(Callback):
    """``predict`` writes ``predictions.csv`` into the run folder: for each test sample its class, the predicted class
    and that one's probability.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier predictions, but leave the file of another run alone."""
        refuse_to_overwrite(trainer, PREDICTIONS)
        self._parts = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what will be written."""
        probabilities, predicted = outputs.max(dim=1)
        places = torch.tensor(stream_of(trainer).evaluation_batch("test", batch_idx))
        self._parts.append((places, batch[1].cpu(), predicted.cpu(), probabilities.cpu()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        columns = gather_rows(*(torch.cat(part).to(pl_module.device) for part in zip(*self._parts, strict=True)))
        path = run_folder(trainer) / PREDICTIONS
        if not trainer.is_global_zero:
            return
        names = stream_of(trainer).class_names
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["index", "class", "predicted_class", "probability"])
        rows = sorted(zip(*(column.tolist() for column in columns), strict=True))
        for place, target, predicted, probability in rows:
            writer.writerow([place, names[target], names[predicted], f"{probability:.6f}"])
        write_at_once(path, text.getvalue())
        pl_module.print(f"predictions in {path}")
