"""Mahalanobis distances by a covariance of each class."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError, require
from mh_lightning.heads.base import NO_SPREAD, ClosedFormHead
from mh_lightning.long_work import with_cost


class ShrunkClassCovariances(ClosedFormHead):
    r"""Classifies by the Mahalanobis distance to each class's mean, in that class's own, shrunk correlations.

    .. math::
        z = \mathrm{sign}(x) |x|^t, \qquad
        \hat S_c = S_c + \gamma_1 V_1 I + \gamma_2 V_2 (\mathbf{1} - I), \qquad
        R_c = D^{-1/2} \hat S_c D^{-1/2}, \qquad
        o_c = -(z - \mu_c)^\top R_c^{-1} (z - \mu_c)

    with the mean :math:`\mu_c` and the covariance :math:`S_c` of the class's z, the mean :math:`V_1` of the
    diagonal and :math:`V_2` of the other entries of :math:`S_c`, and the diagonal D of :math:`\hat S_c`. A class whose
    samples do not differ, as long as it has but one, has R = I. Features x are in units (`ClosedFormHead.unit`).
    Neither the order of the samples nor how they are cut into batches matters, up to rounding.

    The authors' code differs: for networks trained on the first task it transforms the mean, in place of taking the
    mean of transformed features, shrinks twice, and scales z and the mean to length 1 (`normalize` does that last
    step); for a ViT it has t = 1, :math:`\gamma_2 = 0` and features of length 1.

    Source: Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual
    Learning", NeurIPS 2023.

    Args:
        num_features: n.
        num_classes: C.
        tukey: t, above 0; 1 leaves features as they are.
        diagonal_shrinkage: :math:`\gamma_1`, not negative.
        off_diagonal_shrinkage: :math:`\gamma_2`, not negative; no more than :math:`\gamma_1` is always safe.
        normalize: scale z and the means to length 1 before their difference.

    Attributes:
        means: of each class's z, (C, n), in float64.
        scatters: sum over each class of :math:`(z - \mu_c)(z - \mu_c)^\top`, (C, n, n). Sums of squares about the
            mean cancel nothing, so float32 will do, and half the memory: 4 C n² bytes; to solve as much again.

    Raises:
        UserError: if options are out of range, or too small for the correlations to be inverted.

    Example:
        >>> head = ShrunkClassCovariances(1, 2)
        >>> head.update(torch.tensor([[0.0], [4.0], [9.0], [25.0]]), torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[4.0], [9.0]]))
        tensor([[-1., -4.],
                [-4., -1.]])
    """

    in_units: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    means: Tensor
    scatters: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        tukey: float = 0.5,
        diagonal_shrinkage: float = 1.0,
        off_diagonal_shrinkage: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(num_features, num_classes)
        require("tukey", tukey, above=0, below=math.inf)
        for name, value in (
            ("diagonal_shrinkage", diagonal_shrinkage),
            ("off_diagonal_shrinkage", off_diagonal_shrinkage),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be finite and not negative, got {value}.")
        self.tukey, self.normalize = tukey, normalize
        self.diagonal_shrinkage, self.off_diagonal_shrinkage = diagonal_shrinkage, off_diagonal_shrinkage
        self.register_buffer("means", torch.zeros(num_classes, num_features, dtype=torch.float64))
        self.register_buffer("scatters", torch.zeros(num_classes, num_features, num_features, dtype=torch.float32))

    def transform(self, features: Tensor) -> Tensor:
        """Features to z, both (b, n)."""
        features = features.double()
        return features.sign() * features.abs().pow(self.tukey)

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        transformed = self.transform(features)
        for label in torch.bincount(targets).nonzero().flatten().tolist():
            rows = transformed[targets == label]
            before, added = int(self.counts[label]), len(rows)
            mean = rows.mean(dim=0)
            shift = mean - self.means[label]
            # squares about the common mean are those about both means, and that of the shift between them
            parts = (rows - mean, shift.unsqueeze(0) * math.sqrt(before * added / (before + added)))
            centred = torch.cat(parts).to(self.scatters.dtype)
            self.scatters[label].addmm_(centred.T, centred)
            self.means[label] += shift * (added / (before + added))

    def solve(self) -> tuple[Tensor, ...]:
        """The means (C, n), and for each class A (n, n) with the inverse of R equal to AᵀA, or no rows."""
        means = F.normalize(self.means, dim=1) if self.normalize else self.means
        what = f"{type(self).__name__}: inverting covariances of {self.num_features} features"
        counts = self.counts.tolist()
        found = {
            label: self._whitening(self.means[label], self.scatters[label], counts[label])
            for label in with_cost([label for label, count in enumerate(counts) if count], what, "class")
        }
        none = self.scatters[0, :0]
        return means, *(found.get(label, none) for label in range(self.num_classes))

    def _whitening(self, mean: Tensor, scatter: Tensor, count: int) -> Tensor:
        identity = torch.eye(self.num_features, dtype=torch.float64, device=scatter.device)
        if bool(scatter.diagonal().sum() <= NO_SPREAD * count * mean.square().sum()):
            return identity.to(scatter.dtype)
        covariance = scatter.double() / (count - 1)
        variances = covariance.diagonal()
        others = (covariance.sum() - variances.sum()) / max(1, self.num_features * (self.num_features - 1))
        on, off = self.diagonal_shrinkage * variances.mean(), self.off_diagonal_shrinkage * others
        shrunk = covariance + off
        shrunk.diagonal().add_(on - off)
        deviations = shrunk.diagonal().sqrt()
        correlations = shrunk / deviations / deviations.unsqueeze(1)
        factor, failed = torch.linalg.cholesky_ex(correlations)
        rounding = torch.finfo(scatter.dtype).eps * self.num_features
        while bool(failed) and 0 < self.diagonal_shrinkage >= self.off_diagonal_shrinkage:  # then it is all that fails
            correlations.diagonal().add_(rounding)
            factor, failed = torch.linalg.cholesky_ex(correlations)
            rounding *= 10
        singular = self.diagonal_shrinkage == 0 and count <= self.num_features  # whatever rounding makes of it
        if singular or bool(failed):
            raise UserError(
                f"diagonal_shrinkage={self.diagonal_shrinkage}: the covariance of {count} samples of a class in "
                f"{self.num_features} dimensions, with off_diagonal_shrinkage={self.off_diagonal_shrinkage}, cannot be "
                "inverted; 1 would do, if the other is not larger."
            )
        whitening: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return whitening.to(scatter.dtype)

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Negative squared distances (b, C)."""
        means, *whitenings = solution
        transformed = self.transform(features)
        if self.normalize:
            transformed = F.normalize(transformed, dim=1)
        # a product for each class: all at once would hold C copies of the batch
        distances = [
            ((transformed - mean).to(whitening.dtype) @ whitening.T).square().sum(dim=1)
            for mean, whitening in zip(means, whitenings, strict=True)
        ]
        return -torch.stack(distances, dim=1)
