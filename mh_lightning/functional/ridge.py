"""Ridge regressions from sums of products, and the choice of their ridges without samples held out."""

from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

CANDIDATES_A_DECADE = 4
DECADES = 7  # below ten times the largest eigenvalue; sums in float32 hold no more

SMALLEST = 1e-12  # eigenvalue that ridges go by, lest all be 0 where all features are


class Spectrum(NamedTuple):
    """A Gram matrix by its eigenvalues and eigenvectors."""

    values: Tensor  # (d,), ascending, none negative
    vectors: Tensor  # (d, d), in columns

    @classmethod
    def of(cls, gram: Tensor) -> "Spectrum":
        """Of a Gram matrix (d, d), in float64."""
        # PyTorch's does not converge on some matrices of low rank
        found = scipy.linalg.eigh(gram.double().cpu().numpy(), check_finite=False)
        values, vectors = (torch.from_numpy(part).to(gram.device) for part in found)
        return cls(values.clamp_min(0), vectors)


class RidgeFits(NamedTuple):
    """What ridge regressions would be, one for each candidate of the ridge; all are (ridges,)."""

    errors: Tensor  # sums of squared differences to the targets
    freedom: Tensor  # degrees of freedom
    squares: Tensor  # sums of the fitted values' squares


def candidate_ridges(largest: Tensor) -> Tensor:
    """Ridges to choose from, (29,), relative to the largest eigenvalue.

    Example:
        >>> candidate_ridges(torch.tensor(1.0))[[0, -1]]
        tensor([1.0000e-06, 1.0000e+01], dtype=torch.float64)
    """
    steps = torch.arange(DECADES * CANDIDATES_A_DECADE + 1, dtype=torch.float64, device=largest.device)
    return 10 * largest.double().clamp_min(SMALLEST) * 10 ** (steps / CANDIDATES_A_DECADE - DECADES)


def fits_of(spectrum: Spectrum, products: Tensor, squares: Tensor | float, ridges: Tensor) -> RidgeFits:
    r"""What :math:`W = (A + \lambda I)^{-1} C` would be for each :math:`\lambda`.

    With :math:`A = Q S Q^\top` and :math:`q_i = \|(Q^\top C)_i\|^2`, the errors are
    :math:`\sum \|y\|^2 - 2 \sum_i \frac{q_i}{s_i + \lambda} + \sum_i \frac{q_i s_i}{(s_i + \lambda)^2}`, whose last
    part is the sum of the fitted values' squares, and the freedom is :math:`\sum_i \frac{s_i}{s_i + \lambda}`.

    Args:
        spectrum: of A, (d, d).
        products: C, (d, classes).
        squares: :math:`\sum \|y\|^2`, of the targets.
        ridges: candidates, (ridges,).

    Example:
        >>> fits_of(Spectrum.of(torch.eye(1)), torch.tensor([[2.0]]), 4.0, torch.tensor([1.0])).errors
        tensor([1.], dtype=torch.float64)
    """
    q = (spectrum.vectors.T @ products.double()).square().sum(dim=1)
    inverse = 1 / (spectrum.values + ridges.double().unsqueeze(1))
    fitted = inverse.square() @ (q * spectrum.values)
    return RidgeFits(squares - 2 * inverse @ q + fitted, inverse @ spectrum.values, fitted)


def cross_validation_score(errors: Tensor, freedom: Tensor, samples: float) -> Tensor:
    r"""Generalised cross-validation, :math:`N E / (N - h)^2`, infinite where no sample is left over.

    Source: Golub, Heath and Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter",
    Technometrics 21, 1979.

    Args:
        errors: E, sums of squares, of any shape.
        freedom: h, of the same shape.
        samples: N.

    Example:
        >>> cross_validation_score(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 4.0]), 4.0)
        tensor([2., inf])
    """
    left = samples - freedom
    return torch.where(left > 0, samples * errors.clamp_min(0) / left.square(), torch.inf)


class BlendedFits:
    r"""Generalised cross-validation of local regressions that are blended, on the residual of one that all share.

    Sample i is answered by :math:`x_i^\top (W_0 + \sum_j \alpha_{ij} W_j)` with
    :math:`W_j = (A_j + \lambda I)^{-1} R_j`, :math:`R_j = C_j - A_j W_0`. The degrees of freedom of the whole are, with
    :math:`W_0 = (G + \lambda_0 I)^{-1} C` and :math:`\sum_i \alpha_{ij}^2 x_i x_i^\top \approx \rho_j A_j`,

    .. math::
        h = \mathrm{tr}\,G (G + \lambda_0 I)^{-1} + \sum_j \Bigl( \rho_j\,\mathrm{tr}\,A_j (A_j + \lambda I)^{-1}
            - \mathrm{tr}\,A_j (A_j + \lambda I)^{-1} A_j (G + \lambda_0 I)^{-1} \Bigr)

    The error of a blend is less than the blend of the errors, by how much its parts differ; parts that do not
    correlate would make it :math:`\sum_j (1 - \rho_j)\,\mathrm{tr}\,W_j^\top A_j W_j` less.

    Args:
        ridges: candidates for :math:`\lambda`, (ridges,).
        shared: spectrum of G, or None without a shared regression.
        shared_ridge: :math:`\lambda_0`.

    Attributes:
        errors: so far, (ridges,).
        freedom: so far, (ridges,).
    """

    def __init__(self, ridges: Tensor, shared: Spectrum | None, shared_ridge: Tensor) -> None:
        self.ridges, self.shared = ridges, shared
        self.errors, self.freedom = torch.zeros_like(ridges), torch.zeros_like(ridges)
        if shared is not None:
            self._inverse = 1 / (shared.values + shared_ridge)
            self.freedom += shared.values @ self._inverse

    def add(self, gram: Tensor, residual: Tensor, squares: Tensor, overlap: Tensor) -> None:
        r"""Count a unit in.

        Args:
            gram: :math:`A_j`, (d, d).
            residual: :math:`R_j`, (d, classes).
            squares: :math:`\sum_i \alpha_{ij} \|y_i - W_0^\top x_i\|^2`.
            overlap: :math:`\rho_j = \sum_i \alpha_{ij}^2 / \sum_i \alpha_{ij}`.
        """
        unit = Spectrum.of(gram)
        fits = fits_of(unit, residual, squares, self.ridges)
        self.errors += fits.errors - (1 - overlap) * fits.squares
        self.freedom += overlap * fits.freedom
        if self.shared is not None:
            rotated = (unit.vectors.T @ self.shared.vectors).square() @ self._inverse
            self.freedom -= (unit.values.square() * rotated / (unit.values + self.ridges.unsqueeze(1))).sum(dim=1)

    def best(self, samples: float) -> Tensor:
        """The candidate with the least score."""
        return self.ridges[cross_validation_score(self.errors, self.freedom, samples).argmin()]
