"""Nearest class means of a stream: what it tells before it learns."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mh_lightning.backbones import Identity
from mh_lightning.callbacks.tasks import TaskBoundaries
from mh_lightning.data import Tensors
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm
from tests.blobs import CLASSES, FEATURES, blobs


def told_of(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What was told, and the samples and classes in the order of the stream."""
    (x, targets), (x_test, y_test) = blobs(30, 1), blobs(20, 2)
    told: list[Tensor] = []
    batches: list[tuple[Tensor, Tensor]] = []

    class Watched(ClosedForm):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            learnt = super().training_step(batch, batch_idx)
            told.append(learnt["correct"])
            batches.append((batch[0], batch[1]))
            return learnt

    stream = Tensors(x, targets, x_test, y_test, increment=CLASSES, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[TaskBoundaries()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Watched(Identity(FEATURES), ClassMeans), stream)
    seen, classes = (torch.cat(part) for part in zip(*batches, strict=True))
    return torch.cat(told), seen, classes


def test_what_counts_as_correct_is_known_before_it_is_learnt() -> None:
    told, _, classes = told_of(batch_size=30)
    assert told.sum() <= (classes == 0).sum()  # nothing is known yet: all look like the first class


@pytest.mark.parametrize("chunk_size", [None, 6, 30])
def test_a_chunk_is_learnt_batch_after_batch(chunk_size: int | None) -> None:
    told, x, targets = told_of(batch_size=2, chunk_size=chunk_size)
    head, expected = ClassMeans(FEATURES, CLASSES), []
    for rows, classes in zip(x.split(2), targets.split(2), strict=True):
        expected.append(head(rows).argmax(dim=1) == classes)
        head.update(rows, classes)
    assert torch.equal(told, torch.cat(expected)) and 0 < told.sum() < 30
