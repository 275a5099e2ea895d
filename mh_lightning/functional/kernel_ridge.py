"""Kernel ridge regression with landmarks, and a linear part beside whose sums know samples that are kept no more."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mh_lightning.functional.ridge import (
    Regression,
    RidgeFits,
    Spectrum,
    Sums,
    best_regression,
    best_ridge,
    candidate_ridges,
    solve_ridge,
)

SPREAD_OF = 1000  # samples whose distances tell the width
EQUAL = 64  # roundings of the largest squared length: squared distances that are less are none
SMALLEST_EIGENVALUE = 1e-9  # of a kernel matrix, beside its largest: what is less is rounding
ROUNDINGS = 32  # of its entries: the same of these


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Between a (N, n) and b (m, n): (N, m), by one product.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [0.0, 3.0]]))
        tensor([[25.,  0.]])
    """
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp_min_(0)


def neighbourhood(samples: Tensor) -> float:
    """The squared distance within which a tenth of the other samples lie, the median over the first thousand (N, n).

    Samples that are equal count once; it is 1 where all are.

    Example:
        >>> neighbourhood(torch.tensor([[0.0], [1.0], [1.0], [4.0]]))
        1.0
    """
    samples = samples[:SPREAD_OF]
    distances = squared_distances(samples, samples)
    equal = distances <= EQUAL * torch.finfo(samples.dtype).eps * samples.square().sum(dim=1).amax()
    others = (~equal).sum(dim=1)
    ordered = distances.masked_fill_(equal, torch.inf).sort(dim=1).values
    tenth = torch.minimum(others, torch.full_like(others, max(1, len(samples) // 10)))
    found = ordered.gather(1, (tenth - 1).clamp_min(0).unsqueeze(1))[others > 0]
    return float(found.median()) if len(found) else 1.0


def responses(z: Tensor, landmarks: Tensor, width: float | Tensor) -> Tensor:
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
        """Of so many linear weights times a ridge, and of K, (m, m), whose entries are rounded as its type says."""
        values, vectors = Spectrum.of(kernel.double())
        kept = values > max(SMALLEST_EIGENVALUE, ROUNDINGS * torch.finfo(kernel.dtype).eps) * values.amax()
        return cls(linear, 1 / math.sqrt(ridge), vectors[:, kept] * values[kept].rsqrt())

    def to_basis(self, sums: Tensor) -> Tensor:
        """Sums (linear + m, any) of features as those of the features in the basis, (linear + rank, any)."""
        return torch.cat([self.scale * sums[: self.linear], self.root.T @ sums[self.linear :]])

    def from_basis(self, weights: Tensor) -> Tensor:
        """Weights (linear + rank, C) in the basis as those of the features, (linear + m, C)."""
        return torch.cat([self.scale * weights[: self.linear], self.root @ weights[self.linear :]])


def best_kernel_regression(
    imputed: "ImputedSums",
    penalty: Penalty,
    samples: float,
    kept: float,
    probes: Tensor,
    precision: torch.dtype = torch.float64,
) -> Regression:
    r"""Weights :math:`W = (G + \lambda P)^{-1} B` with the :math:`\lambda` that is best for the kept samples.

    In the basis of the penalty this is an ordinary ridge regression. Generalised cross-validation over all samples
    would take those that are not kept for ones that memories M do not touch, and choose far too little or too much
    where they are many. So it is that of the n kept ones. They are drawn from all alike, so of their sums, what is
    linear is taken for n / N of all's, and the rest is known:

    .. math::
        G' = \tfrac nN G + \left(1 - \tfrac nN\right)
            \begin{pmatrix} 0 & 0 \\ 0 & \sum_\text{kept} e e^\top \end{pmatrix}, \qquad
        E = n - 2\,\mathrm{tr}\,W^\top B' + \mathrm{tr}\,W^\top G' W, \qquad
        h = \mathrm{tr}\,G' (G + \lambda P)^{-1}

    and the same of B'. Where all are kept, this is generalised cross-validation of the whole regression.

    Args:
        imputed: G, B and the sums of the rest, of one-hot targets.
        penalty: P.
        samples: N.
        kept: n.
        probes: linear features and responses whose leverage is asked for, (p, d + m).
        precision: of the eigenvectors that tell the scores; the weights are float64's.
    """
    part = kept / samples
    gram, products = penalty.to_basis(penalty.to_basis(imputed.sums.gram).T), penalty.to_basis(imputed.sums.products)
    spectrum = Spectrum.of(gram.to(precision))
    values, ridges = spectrum.values.double(), candidate_ridges(spectrum.values.amax())
    rest_gram, rest_products = (one.to(precision) for one in imputed.rest)
    to_memories = penalty.root.to(precision) @ spectrum.vectors[penalty.linear :]
    rotated = (spectrum.vectors.T @ products.to(precision)).double()
    products_of_kept = part * rotated + (1 - part) * (to_memories.T @ rest_products).double()
    squares_of_kept = part * values + (1 - part) * ((rest_gram @ to_memories) * to_memories).sum(dim=0).double()
    errors = []
    for ridge in ridges:
        weights = rotated / (values + ridge).unsqueeze(1)
        memories = to_memories @ weights.to(precision)
        of_rest = (memories * (rest_gram @ memories)).sum().double()
        explained = part * (values @ weights.square()).sum() + (1 - part) * of_rest
        errors.append(kept - 2 * (weights * products_of_kept).sum() + explained)
    freedom = (1 / (values + ridges.unsqueeze(1))) @ squares_of_kept
    ridge = best_ridge(ridges, RidgeFits.of(torch.stack(errors), freedom, ridges.new_tensor(kept)), kept)
    asked = penalty.to_basis(probes.T.double())
    solved = solve_ridge(gram, torch.cat([products, asked], dim=1), ridge)
    weights, rest = solved.tensor_split([products.shape[1]], dim=1)
    return Regression(penalty.from_basis(weights), float(ridge), (asked * rest).sum(dim=0))


class ImputedSums(NamedTuple):
    """Sums over all samples, of which only some are kept, and what is known of these alone."""

    sums: Sums  # of (h, responses) over all samples
    rest: Sums  # of what the kept samples' responses are beyond what is linear in h: (m, m) and (m, C)


def sums_of_all(linear: Tensor, kept_responses: Tensor, targets: Tensor) -> ImputedSums:
    """The same of samples that are all kept, as they were: nothing is inferred.

    Args:
        linear: linear features, (N, d).
        kept_responses: (N, m).
        targets: (N, classes).
    """
    features, targets = torch.cat([linear, kept_responses], dim=1).double(), targets.double()
    m = kept_responses.shape[1]
    nothing = Sums(features.new_zeros(m, m), features.new_zeros(m, targets.shape[1]))
    return ImputedSums(Sums.of(features, targets), nothing)


def with_samples_not_kept(linear: Sums, kept_linear: Tensor, kept_responses: Tensor, targets: Tensor) -> ImputedSums:
    r"""Sums of linear features and responses over all samples, of which only some are kept.

    The responses of the kept samples are split into what is linear in their features, :math:`A^\top h`, by a ridge
    regression that generalised cross-validation chooses, and the rest e. Those of the others are taken for
    :math:`A^\top h`, whose sums follow from the exact ones of h; nothing else is known of them:

    .. math::
        G = \begin{pmatrix} S & S A \\ A^\top S & A^\top S A + \sum_\text{kept} e e^\top \end{pmatrix}, \qquad
        B = \begin{pmatrix} C \\ A^\top C + \sum_\text{kept} e y^\top \end{pmatrix}

    where e and h are taken to be uncorrelated, as the ridge regression nearly makes them, so that G is positive
    semidefinite whatever A is, and however codes were rounded. The kept samples are drawn from all alike, so e does not
    tell early samples from late ones.

    Args:
        linear: S and C, the sums of h over all samples, (d, d) and (d, classes).
        kept_linear: h of the samples that are kept, (N, d).
        kept_responses: their responses, (N, m).
        targets: theirs, (N, classes).

    Returns:
        Sums of (h, responses): (d + m, d + m) and (d + m, classes); and those of e.
    """
    of_kept = Sums.of(kept_linear, kept_responses)
    squares = float(kept_responses.square().sum(dtype=torch.float64))
    explained = best_regression(of_kept, float(len(kept_linear)), squares).weights
    rest = torch.addmm(kept_responses, kept_linear, explained, alpha=-1)
    of_rest, explained = Sums(*(one.double() for one in Sums.of(rest, targets))), explained.double()
    cross = linear.gram @ explained
    corner = of_rest.gram + explained.T @ cross
    products = torch.cat([linear.products, of_rest.products + explained.T @ linear.products])
    gram = torch.cat([torch.cat([linear.gram, cross], dim=1), torch.cat([cross.T, corner], dim=1)])
    return ImputedSums(Sums(gram, products), of_rest)
