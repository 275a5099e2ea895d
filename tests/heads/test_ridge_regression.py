"""One ridge regression, and features divided by their length, against scikit-learn and finite differences."""

import pytest
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.functional.ridge import (
    Spectrum,
    Sums,
    best_regression,
    candidate_ridges,
    cross_validation_score,
    fits_of,
)
from mh_lightning.heads import RidgeRegression
from tests.blobs import CLASSES, FEATURES, blobs


def learnt(samples: int, features: int = FEATURES, **options: str) -> tuple[RidgeRegression, Tensor, Tensor]:
    x, targets = blobs(samples, 1, offset=3.0, features=features)
    head = RidgeRegression(features, CLASSES, **options)
    for part in zip(x.split(4096), targets.split(4096), strict=True):
        head.update(*part)
    return head, x, targets


def exact(head: RidgeRegression, x: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
    """The regression of all samples at once, in float64, by scikit-learn with the ridge that generalised
    cross-validation chooses.
    """
    h, y = F.pad(normalised(x.double(), head.normalization), (0, 1), value=1.0), F.one_hot(targets, CLASSES).double()
    spectrum = Spectrum.of(h.T @ h)
    ridges = candidate_ridges(spectrum.values.amax())
    fits = fits_of(spectrum, h.T @ y, y.sum(), ridges)
    ridge = float(ridges[cross_validation_score(fits.errors, fits.freedom, len(x)).argmin()])
    model = RidgeCV([ridge], fit_intercept=False).fit(h.numpy(), y.numpy())
    asked = F.pad(normalised(queries.double(), head.normalization), (0, 1), value=1.0)
    return torch.from_numpy(model.predict(asked.numpy()))


@pytest.mark.parametrize("normalization", ["sqrt", "l2"])
def test_is_scikit_learns_regression_from_sums_in_float32(normalization: str) -> None:
    head, x, targets = learnt(100_000, normalization=normalization)
    queries = blobs(300, 2, offset=3.0)[0]
    found, expected = head(queries).double(), exact(head, x, targets, queries)
    assert head.gram.strips.dtype == torch.float32 and float((found - expected).abs().max()) < 5e-3
    assert float((found.argmax(dim=1) == expected.argmax(dim=1)).double().mean()) > 0.99


def test_errors_and_freedom_of_candidates_are_those_of_the_hat_matrix() -> None:
    x, targets = blobs(80, 1)
    h, y = x.double(), F.one_hot(targets, CLASSES).double()
    ridges = candidate_ridges(torch.linalg.eigvalsh(h.T @ h).amax())
    fits = fits_of(Spectrum.of(h.T @ h), h.T @ y, y.sum(), ridges)
    for ridge, error, freedom in zip(ridges, *fits, strict=True):
        hat = h @ torch.linalg.solve(h.T @ h + ridge * torch.eye(FEATURES), h.T)
        torch.testing.assert_close(freedom, hat.trace())
        torch.testing.assert_close(error, (y - hat @ y).square().sum())


def test_the_ridge_is_the_best_of_leave_one_out_where_samples_are_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.float64)).Q * 8
    y = x @ torch.randn(8, 2, generator=generator, dtype=torch.float64) + 5 * torch.randn(
        64, 2, generator=generator, dtype=torch.float64
    )
    found = best_regression(Sums.of(x, y), 64, float(y.square().sum()))

    def score(ridge: float) -> float:
        hat = x @ torch.linalg.solve(x.T @ x + ridge * torch.eye(8), x.T)
        return float((y - hat @ y).square().sum() / (1 - hat.trace() / 64) ** 2)

    candidates = [640 * 10 ** (-step / 4) for step in range(29)]
    assert found.ridge == pytest.approx(min(candidates, key=score))
    torch.testing.assert_close(found.weights, torch.linalg.solve(x.T @ x + found.ridge * torch.eye(8), x.T @ y))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisation_passes_gradients(normalization: str) -> None:
    x = blobs(20, 1)[0].double().requires_grad_()
    normalised(x, normalization).pow(3).sum().backward()
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        change = normalised(x + step, normalization).pow(3).sum() - normalised(x - step, normalization).pow(3).sum()
    assert x.grad is not None
    torch.testing.assert_close(2 * (x.grad * step).sum(), change, rtol=1e-4, atol=1e-9)
    zeros = torch.zeros(2, 3, requires_grad=True)  # where roots and lengths have no derivative
    normalised(zeros, normalization).square().sum().backward()
    assert zeros.grad is not None and bool(zeros.grad.isfinite().all())


@pytest.mark.parametrize("scale", [1e-18, 1e30])
def test_a_unit_of_measure_does_not_matter(scale: float) -> None:
    x, targets = blobs(300, 1)
    plain, scaled = RidgeRegression(FEATURES, CLASSES, "l2"), RidgeRegression(FEATURES, CLASSES, "l2")
    plain.update(x, targets)
    scaled.update(x * scale, targets)
    torch.testing.assert_close(scaled(x * scale), plain(x), rtol=1e-4, atol=1e-5)


def test_features_as_they_are_are_refused() -> None:
    with pytest.raises(UserError, match="normalization must be one of"):
        RidgeRegression(2, 2, "none")
