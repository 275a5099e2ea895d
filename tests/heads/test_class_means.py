"""Nearest class means, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from mh_lightning.heads import ClassMeans
from tests.blobs import CLASSES, FEATURES, blobs


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
