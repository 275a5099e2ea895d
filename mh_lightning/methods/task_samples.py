"""A task's training samples, seen once more when it ends: each once, as evaluation sees them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mh_lightning.methods.base import Batch, ContinualMethod


def shows_progress(trainer: Any) -> bool:
    """Whether long work inside of a fit draws a progress bar of its own, on this rank."""
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


def batches_of_task(
    method: ContinualMethod, task: int, description: str, places: NDArray[np.int64] | None = None
) -> Iterator[Batch]:
    """Each batch of a task's training samples, as far as it is this rank's, which may be nothing of it.

    Args:
        method: in a fit.
        task: from 0.
        description: of the progress bar.
        places: of the samples wanted, among those of the task in the data's order; by default all.
    """
    loader = method.stream.unaugmented_train_dataloader(task, places)
    quiet = not shows_progress(method.trainer)
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=quiet):
        inputs, targets, tasks = method.trainer.precision_plugin.convert_input(
            [part.to(method.device) for part in batch]
        )
        yield inputs, targets, tasks


@torch.no_grad()
def features_of_task(method: ContinualMethod, task: int, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (b, n) in evaluation mode, in float32, and classes (b,) of this rank's share of each batch."""
    with method.evaluating():
        for x, targets, _ in batches_of_task(method, task, description):
            with method.trainer.precision_plugin.forward_context():
                features = method.features(x)
            yield features.float(), targets
