"""Mahalanobis distances by class, against the published steps in numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mh_lightning.errors import UserError
from mh_lightning.heads import ShrunkClassCovariances
from tests.blobs import CLASSES, FEATURES, blobs


def direct(
    x: NDArray[np.float64],
    targets: NDArray[np.int64],
    queries: NDArray[np.float64],
    tukey: float,
    shrinkage: tuple[float, float],
    normalize: bool,
) -> NDArray[np.float64]:
    """Distances (b, C), one step after the other."""

    def transform(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sign(values) * np.abs(values) ** tukey

    def to_length_1(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values / np.linalg.norm(values, axis=-1, keepdims=True) if normalize else values

    columns = []
    for label in range(CLASSES):
        rows = transform(x[targets == label])
        covariance = np.cov(rows.T)
        off_diagonal = covariance[~np.eye(FEATURES, dtype=bool)].mean()
        shrunk = covariance + shrinkage[0] * np.diag(covariance).mean() * np.eye(FEATURES)
        shrunk += shrinkage[1] * off_diagonal * (1 - np.eye(FEATURES))
        deviations = np.sqrt(np.diag(shrunk))
        inverse = np.linalg.inv(shrunk / np.outer(deviations, deviations))
        differences = to_length_1(transform(queries)) - to_length_1(rows.mean(axis=0))
        columns.append(np.einsum("bi,ij,bj->b", differences, inverse, differences))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("tukey", [0.5, 1.0])
@pytest.mark.parametrize("shrinkage", [(1.0, 1.0), (0.5, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_is_the_published_distance(
    tukey: float, shrinkage: tuple[float, float], normalize: bool, offset: float
) -> None:
    (x, targets), (queries, _) = blobs(600, 1, offset), blobs(50, 2, offset)
    head = ShrunkClassCovariances(FEATURES, CLASSES, tukey, *shrinkage, normalize)
    for batch in zip(x.split(50), targets.split(50), strict=True):
        head.update(*batch)
        head.settle()
    arrays = (x.double().numpy(), targets.numpy(), queries.double().numpy())
    expected = torch.from_numpy(-direct(*arrays, tukey, shrinkage, normalize)).float()
    # the shortest of vectors of length 1 are small differences
    torch.testing.assert_close(head(queries), expected, rtol=1e-3, atol=1e-6)


def test_a_class_of_equal_samples_has_plain_distances() -> None:
    head = ShrunkClassCovariances(2, 2, tukey=1.0)
    head.update(torch.tensor([[1.0, 2.0], [5.0, 5.0], [5.0, 5.0]]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(head(torch.tensor([[4.0, 6.0]])), torch.tensor([[-25.0, -2.0]]))


def test_a_feature_that_never_varies_is_shrunk_too() -> None:
    x, targets = blobs(100, 1)
    x[:, 0] = 0.0
    head = ShrunkClassCovariances(FEATURES, CLASSES)
    head.update(x, targets)
    assert head(x).isfinite().all()


@pytest.mark.parametrize("shrinkage", [(0.0, 0.0), (0.0, 1.0)])
def test_too_little_shrinkage_is_refused(shrinkage: tuple[float, float]) -> None:
    x, targets = blobs(20, 1)
    head = ShrunkClassCovariances(FEATURES, CLASSES, 0.5, *shrinkage)
    head.update(x, targets)
    with pytest.raises(UserError, match=r"diagonal_shrinkage=0\.0: the covariance of \d samples .* 1 would do"):
        head(x)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"tukey": 0.0}, "tukey must be above 0 and finite, got 0.0"),
        ({"diagonal_shrinkage": -1.0}, "^diagonal_shrinkage must be finite and not negative, got -1.0"),
        ({"off_diagonal_shrinkage": float("inf")}, "off_diagonal_shrinkage must be finite and not negative, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], part: str) -> None:
    with pytest.raises(UserError, match=part):
        ShrunkClassCovariances(2, 2, **options)
