"""Nearest class means, against scikit-learn's."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from mh_lightning.backbones import Identity
from mh_lightning.callbacks.tasks import TaskBoundaries
from mh_lightning.data import Tensors
from mh_lightning.methods.nearest_class_mean import ClassMeans, NearestClassMean

FEATURES, CLASSES = 5, 7


def blobs(samples: int, seed: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Overlapping, unequal classes, each with a sample at least; the same classes for every seed."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.arange(1.0, CLASSES + 1), samples, True, generator=generator)
    targets[:CLASSES] = torch.arange(CLASSES)
    return centres[targets] + torch.randn(samples, FEATURES, generator=generator) + offset, targets


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_is_scikit_learns_nearest_centroid(offset: float) -> None:
    (x, targets), (queries, _) = blobs(200, 1, offset), blobs(300, 2, offset)
    means, reference = ClassMeans(FEATURES, CLASSES), NearestCentroid()
    means.update(x, targets)
    reference.fit(x.double().numpy(), targets.numpy())
    logits = means(queries.double())
    assert np.array_equal(logits.argmax(dim=1).numpy(), reference.predict(queries.double().numpy()))
    centroids = torch.from_numpy(reference.centroids_)
    expected = -(queries.double().unsqueeze(1) - centroids).square().sum(dim=2)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert means.counts.tolist() == torch.bincount(targets).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_batches_in_any_order(size: int, shuffler: random.Random) -> None:
    x, targets = blobs(60, 1)
    whole, parts = ClassMeans(FEATURES, CLASSES), ClassMeans(FEATURES, CLASSES)
    whole.update(x, targets)
    batches = list(zip(x.split(size), targets.split(size), strict=True))
    shuffler.shuffle(batches)
    for batch in batches:
        parts.update(*batch)
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.sums, whole.sums)
    queries = blobs(50, 2)[0]
    torch.testing.assert_close(parts(queries), whole(queries))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("far", [1.0, 300.0])
def test_unseen_classes_are_never_predicted(dtype: torch.dtype, far: float) -> None:
    x, targets = blobs(200, 1)
    seen = targets % 2 == 1
    means = ClassMeans(FEATURES, CLASSES)
    assert means(x.to(dtype)).isfinite().all()  # before any class was seen
    means.update((far * x[seen]).to(dtype), targets[seen])
    queries = (far * blobs(300, 2)[0]).to(dtype)
    logits = means(queries)
    assert logits.isfinite().all() and (logits.argmax(dim=1) % 2 == 1).all()
    assert (logits[:, 0::2] < logits[:, 1::2].min()).all()
    # half precision or not, the nearest is the nearest
    reference = NearestCentroid().fit((far * x[seen]).to(dtype).double().numpy(), targets[seen].numpy())
    assert np.array_equal(logits.argmax(dim=1).numpy(), reference.predict(queries.double().numpy()))


def test_state_dict() -> None:
    x, targets = blobs(100, 1)
    means, other = ClassMeans(FEATURES, CLASSES), ClassMeans(FEATURES, CLASSES)
    means.update(x[:50], targets[:50])
    other.load_state_dict(means.state_dict())
    for head in (means, other):
        head.update(x[50:], targets[50:])
    assert torch.equal(other(x), means(x))


@pytest.mark.parametrize("epochs_per_task", [1, 2])
def test_fit_is_nearest_centroid_of_the_training_samples(epochs_per_task: int) -> None:
    (x, targets), (x_test, y_test) = blobs(150, 1), blobs(50, 2)
    stream = Tensors(x, targets, x_test, y_test, first_task_size=3, increment=2, epochs_per_task=epochs_per_task)
    method = NearestClassMean(Identity(FEATURES))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        callbacks=[TaskBoundaries()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(method, stream)
    assert isinstance(method.head, ClassMeans)
    assert method.head.counts.tolist() == torch.bincount(targets).tolist()  # the second epoch counts nothing
    predicted = torch.cat(trainer.predict(method, stream)).argmax(dim=1)
    reference = NearestCentroid().fit(x.numpy(), targets.numpy())
    assert np.array_equal(predicted.numpy(), reference.predict(x_test.numpy()))


def test_what_counts_as_correct_is_known_before_it_is_learnt() -> None:
    (x, targets), (x_test, y_test) = blobs(30, 1), blobs(20, 2)
    told: list[Tensor] = []

    class Watched(NearestClassMean):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            learnt = super().training_step(batch, batch_idx)
            told.append(learnt["correct"])
            return learnt

    stream = Tensors(x, targets, x_test, y_test, increment=CLASSES, batch_size=30)
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
    trainer.fit(Watched(Identity(FEATURES)), stream)
    assert torch.cat(told).sum() <= (targets == 0).sum()  # nothing is known yet: all look like the first class
