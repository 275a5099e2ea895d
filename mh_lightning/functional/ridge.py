"""Ridge regressions from sums of products, and the choice of their ridges without samples held out."""

from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

CANDIDATES_A_DECADE = 4
DECADES = 7  # below ten times the largest eigenvalue; sums in float32 hold no more
MOST_FREEDOM = 0.5  # of the samples: beyond, the score is the ratio of two numbers that are nearly 0
ROUNDING = 1e-6  # of the sum of the targets' squares: errors that are less are as good as none


class Spectrum(NamedTuple):
    """A Gram matrix by its eigenvalues and eigenvectors."""

    values: Tensor  # (d,), ascending, none negative
    vectors: Tensor  # (d, d), in columns

    @classmethod
    def of(cls, gram: Tensor) -> "Spectrum":
        """Of a Gram matrix (d, d), in its type."""
        try:
            values, vectors = torch.linalg.eigh(gram)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # on some matrices of low rank it does not converge, and SciPy's does
            found = scipy.linalg.eigh(gram.cpu().numpy(), check_finite=False)
            values, vectors = (torch.from_numpy(part).to(gram.device) for part in found)
        return cls(values.clamp_min(0), vectors)


class Regression(NamedTuple):
    """A ridge regression, and the ridge that it chose."""

    weights: Tensor  # (d, C)
    ridge: float
    leverage: Tensor  # how much of its own target each of some samples' answers holds, (p,)


class Sums(NamedTuple):
    """What a regression of targets y on features f needs to know of its samples."""

    gram: Tensor  # sum of f fᵀ, (d, d)
    products: Tensor  # sum of f yᵀ, (d, C)

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> "Sums":
        """Of features (N, d) and targets (N, C)."""
        return cls(features.T @ features, features.T @ targets)


class RidgeFits(NamedTuple):
    """What ridge regressions would be, one for each candidate of the ridge; all are (ridges,)."""

    errors: Tensor  # sums of squared differences to the targets
    freedom: Tensor  # degrees of freedom

    @classmethod
    def of(cls, errors: Tensor, freedom: Tensor, squares: Tensor) -> "RidgeFits":
        """Errors that rounding has made less than it can tell, 1e-6 of the sum of the targets' squares, are set to
        that, and those that it has made negative by more, which no weights have, to infinity.
        """
        least = ROUNDING * squares
        return cls(torch.where(errors < -least, torch.inf, errors.clamp_min(least)), freedom)


def candidate_ridges(largest: Tensor) -> Tensor:
    """Ridges to choose from, four a decade, the largest first: of equals, it is taken.

    They reach from ten times the largest eigenvalue over seven decades, which are 29.

    Args:
        largest: eigenvalue.

    Example:
        >>> candidate_ridges(torch.tensor(1.0))[[0, -1]]
        tensor([1.0000e+01, 1.0000e-06], dtype=torch.float64)
    """
    scale = float(largest) or 1.0  # where all features are 0, any ridge will do
    steps = torch.arange(DECADES * CANDIDATES_A_DECADE + 1, dtype=torch.float64, device=largest.device)
    return 10 * scale * 10 ** (-steps / CANDIDATES_A_DECADE)


def fits_of(spectrum: Spectrum, products: Tensor, squares: Tensor, ridges: Tensor) -> RidgeFits:
    r"""What :math:`W = (A + \lambda I)^{-1} C` would be for each :math:`\lambda`.

    With :math:`A = Q S Q^\top` and :math:`q_i = \|(Q^\top C)_i\|^2`, the errors are
    :math:`\sum \|y\|^2 - 2 \sum_i \frac{q_i}{s_i + \lambda} + \sum_i \frac{q_i s_i}{(s_i + \lambda)^2}`, and
    the freedom is :math:`\sum_i \frac{s_i}{s_i + \lambda}`.

    Args:
        spectrum: of A, (d, d).
        products: C, (d, classes).
        squares: :math:`\sum \|y\|^2`, of the targets.
        ridges: candidates, (ridges,).

    Example:
        >>> fits_of(Spectrum.of(torch.eye(1)), torch.tensor([[2.0]]), torch.tensor(4.0), torch.tensor([1.0])).errors
        tensor([1.], dtype=torch.float64)
    """
    q = (spectrum.vectors.T @ products).double().square().sum(dim=1)
    values = spectrum.values.double()
    inverse = 1 / (values + ridges.double().unsqueeze(1))
    errors = squares - 2 * inverse @ q + inverse.square() @ (q * values)
    return RidgeFits.of(errors, inverse @ values, squares)


def cross_validation_score(errors: Tensor, freedom: Tensor, samples: Tensor | float) -> Tensor:
    r"""Generalised cross-validation, :math:`E / (1 - h / N)^2`, an estimate of the sum of leave-one-out errors.

    Infinite where no sample is left over.

    Source: Golub, Heath and Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter",
    Technometrics 21, 1979.

    Args:
        errors: E, sums of squares, of any shape.
        freedom: h, of the same shape.
        samples: N.

    Example:
        >>> cross_validation_score(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 4.0]), 4.0)
        tensor([8., inf])
    """
    left = 1 - freedom / samples
    return torch.where(left > 0, errors / left.square(), torch.inf)


def best_ridge(ridges: Tensor, fits: RidgeFits, samples: float) -> Tensor:
    """The candidate (ridges,) with the least score; more than half as many degrees of freedom as samples are not
    allowed: there, the score divides nearly 0 by nearly 0.
    """
    score = cross_validation_score(fits.errors, fits.freedom, samples)
    return ridges[score.where(fits.freedom <= MOST_FREEDOM * samples, torch.inf).argmin()]


def best_regression(sums: Sums, samples: float, squares: float, probes: Tensor | None = None) -> Regression:
    r"""Weights :math:`(G + \lambda I)^{-1} B` with the :math:`\lambda` that generalised cross-validation chooses.

    Args:
        sums: G (d, d) and B (d, C).
        samples: N.
        squares: sum of the targets' squares.
        probes: features whose leverage is asked for, (p, d), by default none.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
        >>> regression = best_regression(Sums.of(x, 2 * x), samples=4, squares=120)
        >>> round(float(regression.weights), 1)
        2.0
    """
    spectrum = Spectrum.of(sums.gram)
    ridges = candidate_ridges(spectrum.values.amax())
    fits = fits_of(spectrum, sums.products, ridges.new_tensor(squares), ridges)
    ridge = best_ridge(ridges, fits, samples)
    products = spectrum.vectors.T @ sums.products
    weights = spectrum.vectors @ (products / (spectrum.values + ridge.to(products.dtype)).unsqueeze(1))
    rotated = spectrum.vectors.T @ (sums.gram[:, :0] if probes is None else probes.T.to(sums.gram))
    leverage = (rotated.square() / (spectrum.values + ridge.to(rotated.dtype)).unsqueeze(1)).sum(dim=0)
    return Regression(weights, float(ridge), leverage)


def solve_ridge(gram: Tensor, products: Tensor, ridge: Tensor) -> Tensor:
    r""":math:`(G + \lambda I)^{-1} B`, of G (d, d), of which rounding may have made no Gram matrix, and B (d, C).

    Example:
        >>> solve_ridge(torch.eye(1), torch.tensor([[4.0]]), torch.tensor(3.0))
        tensor([[1.]])
    """
    regularised = gram.clone()
    regularised.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    if not bool(failed):
        return torch.cholesky_solve(products, factor)
    spectrum = Spectrum.of(gram)
    return spectrum.vectors @ ((spectrum.vectors.T @ products) / (spectrum.values + ridge).unsqueeze(1))
