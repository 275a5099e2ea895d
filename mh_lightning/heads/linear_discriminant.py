"""Streaming linear discriminant analysis."""

from typing import ClassVar

import torch
from torch import Tensor

from mh_lightning.errors import UserError, require
from mh_lightning.heads.base import NO_SPREAD, ClosedFormHead


class StreamingLinearDiscriminant(ClosedFormHead):
    r"""Linear discriminants of the class means and one covariance that all classes share.

    .. math::
        S = \frac{1}{N} \sum_c \sum_{y_i = c} (x_i - \mu_c)(x_i - \mu_c)^\top, \qquad
        \hat S = (1 - s) S + s \frac{\mathrm{tr} S}{n} I

    .. math::
        o_c = (\mu_c - \mu)^\top \hat S^{-1} (x - \mu) - \tfrac12 (\mu_c - \mu)^\top \hat S^{-1} (\mu_c - \mu)

    with the mean :math:`\mu` of all samples, which gives all classes the same more than without it, and far smaller
    numbers where features have an offset. Every class is as likely as any other: there is no prior, as published. The
    means and the covariance are those of
    all samples so far, from a single pass, where the published code moves both by an approximate running update and
    shrinks towards the unscaled I. So the weights are those of scikit-learn's `LinearDiscriminantAnalysis(
    solver="lsqr", shrinkage=s)`. While no class has samples that differ, S is I, and the nearest mean wins. Neither the
    order of the samples nor how they are cut into batches matters, up to rounding. Logits are up to a constant for each
    sample: where the largest is beyond ±65,536, it is subtracted from all.

    Source: Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR
    Workshops 2020.

    Args:
        num_features: n.
        num_classes: C.
        shrinkage: s, in [0, 1].

    Attributes:
        means: of each class's features, (C, n), in float64.
        scatter: N S, (n, n), in float64. Squares about the means cancel nothing, however large the means are.

    Raises:
        UserError: if the shrinkage is out of range, or too small for the covariance to be inverted.

    Example:
        >>> head = StreamingLinearDiscriminant(1, 2, shrinkage=0.0)
        >>> head.update(torch.tensor([[-2.0], [0.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[0.0], [3.0]]))
        tensor([[ 0., -4.],
                [-6.,  2.]])
    """

    discriminants: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    means: Tensor
    scatter: Tensor

    def __init__(self, num_features: int, num_classes: int, shrinkage: float = 1e-4) -> None:
        super().__init__(num_features, num_classes)
        require("shrinkage", shrinkage, at_least=0, at_most=1)
        self.shrinkage = shrinkage
        self.register_buffer("means", torch.zeros(num_classes, num_features, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(num_features, num_features, dtype=torch.float64))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        rows = features.double()
        numbers = torch.bincount(targets, minlength=self.num_classes)
        means = torch.zeros_like(self.means).index_add_(0, targets, rows) / numbers.clamp_min(1).unsqueeze(1)
        present = numbers.nonzero().flatten()
        before, added, shifts = self.counts[present], numbers[present], (means - self.means)[present]
        # squares about the common mean are those about both means, and that of the shift between them
        weights = (before * added).double() / (before + added)
        for centred in (rows - means[targets], shifts * weights.sqrt().unsqueeze(1)):
            self.scatter.addmm_(centred.T, centred)
        self.means[present] += shifts * (added.double() / (before + added)).unsqueeze(1)

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (C, n) and biases (C,), and the mean of all samples (n,)."""
        shares = self.counts.double() / self.counts.sum()
        centre = shares @ self.means
        covariance, means = self.scatter / self.counts.sum(), self.means - centre
        spread = covariance.trace() / self.num_features
        if bool(spread <= NO_SPREAD * (shares @ self.means.square()).mean()):
            covariance, spread = torch.eye(self.num_features).to(covariance), torch.ones_like(spread)
        covariance *= 1 - self.shrinkage
        covariance.diagonal().add_(self.shrinkage * spread)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        independent = int(self.counts.sum() - self.counts.count_nonzero())
        if bool(failed) or (self.shrinkage == 0 and 0 < independent < self.num_features):
            raise UserError(
                f"shrinkage={self.shrinkage}: the covariance of {int(self.counts.sum())} samples in "
                f"{self.num_features} dimensions cannot be inverted; 0.0001 or more, or more samples, would do."
            )
        weights = torch.cholesky_solve(means.T, factor).T
        return weights, -0.5 * (weights * means).sum(dim=1), centre

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Discriminants (b, C)."""
        weights, biases, centre = solution
        return (features.double() - centre) @ weights.T + biases
