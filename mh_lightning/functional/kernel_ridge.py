"""Kernel ridge regression with landmarks, and a linear part beside whose sums know samples that are kept no more."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mh_lightning.functional.ridge import Spectrum, candidate_ridges, cross_validation_score, fits_of

MOST_FREEDOM = 0.5  # of the samples: beyond, the score is the ratio of two numbers that are nearly 0
SPREAD_OF = 1000  # samples whose distances tell the width
SMALLEST_EIGENVALUE = 1e-9  # of a kernel matrix, beside its largest: what is less is rounding


class Regression(NamedTuple):
    """A ridge regression, and the ridge that it chose."""

    weights: Tensor  # (d, C)
    ridge: float


class Sums(NamedTuple):
    """What a regression of targets y on features f needs to know of its samples, in float64."""

    gram: Tensor  # sum of f fᵀ, (d, d)
    products: Tensor  # sum of f yᵀ, (d, C)

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> "Sums":
        """Of features (N, d) and targets (N, C)."""
        return cls(features.T @ features, features.T @ targets)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Between a (N, n) and b (m, n): (N, m), by one product.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [0.0, 3.0]]))
        tensor([[25.,  0.]])
    """
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp_min_(0)


def median_squared_distance(samples: Tensor) -> float:
    """Between different ones of the first thousand samples (N, n); 1 where there are none.

    Example:
        >>> median_squared_distance(torch.tensor([[0.0], [1.0], [1.0], [3.0]]))
        4.0
    """
    distances = torch.pdist(samples[:SPREAD_OF])
    distances = distances[distances > 0]
    return float(distances.median()) ** 2 if len(distances) else 1.0


def responses(z: Tensor, landmarks: Tensor, width: float) -> Tensor:
    r"""Gaussian kernel :math:`\exp(-\|z - K_j\|^2 / w)` of samples z (N, n) and landmarks K (m, n): (N, m).

    Example:
        >>> responses(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]]), width=1.0)
        tensor([[1.0000, 0.3679]])
    """
    return squared_distances(z, landmarks).div_(-width).exp_()


class Penalty(NamedTuple):
    r"""A basis in which the penalty :math:`\rho \|V\|^2 + \mathrm{tr}\, M^\top K M` is the sum of the weights' squares.

    Directions in which the kernel matrix K is 0 up to rounding are left out.
    """

    linear: int  # how many weights are linear
    scale: float  # of these in the basis
    root: Tensor  # of K's inverse, (m, rank)

    @classmethod
    def of(cls, linear: int, ridge: float, kernel: Tensor) -> "Penalty":
        """Of so many linear weights times a ridge, and of K, (m, m)."""
        values, vectors = Spectrum.of(kernel)
        kept = values > SMALLEST_EIGENVALUE * values.amax()
        return cls(linear, 1 / math.sqrt(ridge), vectors[:, kept] * values[kept].rsqrt())

    def to_basis(self, sums: Tensor) -> Tensor:
        """Sums (linear + m, any) of features as those of the features in the basis, (linear + rank, any)."""
        return torch.cat([self.scale * sums[: self.linear], self.root.T @ sums[self.linear :]])

    def from_basis(self, weights: Tensor) -> Tensor:
        """Weights (linear + rank, C) in the basis as those of the features, (linear + m, C)."""
        return torch.cat([self.scale * weights[: self.linear], self.root @ weights[self.linear :]])


def best_regression(sums: Sums, samples: float, squares: float, penalty: Penalty | None = None) -> Regression:
    r"""Weights :math:`(G + \lambda P)^{-1} B` with the :math:`\lambda` that generalised cross-validation chooses.

    In the basis of the penalty this is an ordinary ridge regression, whose spectrum tells the error and the degrees of
    freedom for each candidate. More than half as many of these as samples are not allowed: there, the score divides
    nearly 0 by nearly 0.

    Args:
        sums: G (d, d) and B (d, C).
        samples: N.
        squares: sum of the targets' squares.
        penalty: P; the identity if it is left out.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
        >>> regression = best_regression(Sums.of(x, 2 * x), samples=4, squares=120)
        >>> round(float(regression.weights), 1)
        2.0
    """
    gram, products = sums
    if penalty is not None:
        gram, products = penalty.to_basis(penalty.to_basis(gram).T), penalty.to_basis(products)
    spectrum = Spectrum.of(gram)
    ridges = candidate_ridges(spectrum.values.amax())
    fits = fits_of(spectrum, products, spectrum.values.new_tensor(squares), ridges)
    score = cross_validation_score(fits.errors, fits.freedom, samples)
    ridge = ridges[score.where(fits.freedom <= MOST_FREEDOM * samples, torch.inf).argmin()]
    products = spectrum.vectors.T @ products.double()
    weights = spectrum.vectors @ (products / (spectrum.values + ridge).unsqueeze(1))
    return Regression(weights if penalty is None else penalty.from_basis(weights), float(ridge))


def with_samples_not_kept(linear: Sums, kept_linear: Tensor, kept_responses: Tensor, targets: Tensor) -> Sums:
    r"""Sums of linear features and responses over all samples, of which only some are kept.

    The responses of the kept samples are split into what is linear in their features, :math:`A^\top h`, by a ridge
    regression that generalised cross-validation chooses, and the rest e. Those of the others are taken for
    :math:`A^\top h`, whose sums follow from the exact ones of h; nothing else is known of them:

    .. math::
        G = \begin{pmatrix} S & S A \\ A^\top S & A^\top S A + \sum_\text{kept} e e^\top \end{pmatrix}, \qquad
        B = \begin{pmatrix} C \\ A^\top C + \sum_\text{kept} e y^\top \end{pmatrix}

    where e and h are taken to be uncorrelated, as least squares makes them, so that G is positive semidefinite whatever
    A is, and however codes were rounded. The kept samples are drawn from all alike, so e does not tell early samples
    from late ones.

    Args:
        linear: S and C, the sums of h over all samples, (d, d) and (d, classes).
        kept_linear: h of the samples that are kept, (N, d).
        kept_responses: their responses, (N, m).
        targets: theirs, (N, classes).

    Returns:
        Sums of (h, responses): (d + m, d + m) and (d + m, classes).
    """
    of_kept = Sums.of(kept_linear.float(), kept_responses.float())  # any A would do, so these digits do
    squares = float(kept_responses.square().sum())
    explained = best_regression(of_kept, float(len(kept_linear)), squares).weights
    rest = torch.addmm(kept_responses, kept_linear, explained, alpha=-1)
    cross = linear.gram @ explained
    corner = torch.addmm(explained.T @ cross, rest.T, rest)
    products = torch.addmm(explained.T @ linear.products, rest.T, targets)
    gram = torch.cat([torch.cat([linear.gram, cross], dim=1), torch.cat([cross.T, corner], dim=1)])
    return Sums(gram, torch.cat([linear.products, products]))
