"""Gaussian classes whose covariances lean on a shared one."""

from typing import ClassVar

import torch
from torch import Tensor

from mh_lightning.errors import UserError, require
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.packed_gram import PackedGram


class RegularisedDiscriminant(ClosedFormHead):
    r"""Quadratic discriminants with covariances of low rank beside the shared one.

    .. math::
        A_c = \alpha_1 \Sigma_c + \alpha_2 \Sigma + \alpha_3 \frac{\mathrm{tr} \Sigma}{n} I, \qquad
        o_c = -\tfrac12 (z - \mu_c)^\top A_c^{-1} (z - \mu_c) - \tfrac12 \log \det A_c

    with z the normalised features and :math:`\Sigma` the mean of the classes' covariances, weighted by their samples.
    Of each :math:`\Sigma_c` only the r largest principal directions are kept, updated in one pass as those of an
    incremental principal component analysis; they are exact while a class has at most r directions. The shared one is
    exact.

    Source: LR-RGDA, arXiv 2602.00144, 2026, with the class covariances in low rank; the update of the directions
    is Ross et al., "Incremental Learning for Robust Visual Tracking", IJCV 2008, section 3.

    Args:
        num_features: n.
        num_classes: C.
        rank: r, at least 1.
        alphas: :math:`\alpha_1, \alpha_2, \alpha_3`, none negative, the last one above 0.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; or "none".

    Attributes:
        means: :math:`\mu_c`, (C, n), float32.
        directions: principal directions of each class's samples about their mean, each as long as the root of the sum
            of squares along it, (C, r, n), float32.
        gram: sum of z zᵀ, a `PackedGram`, float32.

    Raises:
        UserError: if an option is out of range.

    Example:
        >>> head = RegularisedDiscriminant(1, 2, normalization="none")
        >>> x = torch.tensor([[-9.0], [9.0], [-1.0], [1.0]])  # of the same mean
        >>> head.update(x, torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[8.0], [0.5]])).argmax(dim=1)
        tensor([0, 1])
    """

    discriminants: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    means: Tensor
    directions: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        rank: int = 64,
        alphas: tuple[float, float, float] = (0.1, 0.9, 0.01),
        normalization: str = "sqrt",
    ) -> None:
        super().__init__(num_features, num_classes)
        require("rank", rank, at_least=1, whole=True)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        if len(alphas) != 3 or not (min(alphas) >= 0 and 0 < alphas[2] < float("inf")):
            raise UserError(f"alphas must be three numbers, none negative, the last one above 0, got {alphas}.")
        self.rank, self.alphas, self.normalization = rank, alphas, normalization
        self.gram = PackedGram(num_features, torch.float32)
        self.register_buffer("means", torch.zeros(num_classes, num_features, dtype=torch.float32))
        kept = min(rank, num_features)
        self.register_buffer("directions", torch.zeros(num_classes, kept, num_features, dtype=torch.float32))
        self.largest = 2.0**60 / num_features

    @property
    def state_bytes(self) -> int:
        """Bytes of means, directions and sums."""
        return sum(part.numel() * part.element_size() for part in (self.means, self.directions, self.gram.strips))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        z = normalised(features.float(), self.normalization)
        self.gram.add(z)
        for label in torch.bincount(targets).nonzero().flatten().tolist():
            rows = z[targets == label]
            before, mean = float(self.counts[label]), rows.mean(dim=0)
            shift = mean - self.means[label]
            share = len(rows) / (before + len(rows))
            stacked = torch.cat([self.directions[label], rows - mean, (before * share) ** 0.5 * shift.unsqueeze(0)])
            values, vectors = torch.linalg.svd(stacked, full_matrices=False)[1:]
            kept = min(self.directions.shape[1], len(values))
            self.directions[label].zero_()
            self.directions[label, :kept] = values[:kept].unsqueeze(1) * vectors[:kept]
            self.means[label] += share * shift

    def solve(self) -> tuple[Tensor, ...]:
        """What makes z white under the part that classes share (n, n), the means in it (C, n), what each class's
        directions take from the squared distance (C, r, n), and the log-determinants (C,).
        """
        counts = self.counts.double()
        of_class, of_all, of_identity = self.alphas
        shared = (self.gram.whole() - (self.means.double().T * counts) @ self.means.double()) / counts.sum()
        spread = shared.trace().clamp_min(0) / len(shared)
        spread = spread if bool(spread > 1e-6 * self.means.double().square().mean()) else torch.ones_like(spread)
        shared = of_all * shared
        shared.diagonal().add_(of_identity * spread)
        values, vectors = torch.linalg.eigh(shared)
        values = values.clamp_min(1e-6 * of_identity * spread)  # rounding in float32
        white = vectors * values.rsqrt()
        scale = (of_class / counts.clamp_min(1)).sqrt()
        directions = scale[:, None, None] * self.directions.double() @ white
        inner = directions @ directions.mT
        inner.diagonal(dim1=1, dim2=2).add_(1)
        factors = torch.linalg.cholesky(inner)
        taken = torch.linalg.solve_triangular(factors, directions, upper=False)
        log_determinants = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(dim=1) + values.log().sum()
        return white.float(), (self.means.double() @ white).float(), taken.float(), log_determinants.float()

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Discriminants (b, C)."""
        white, means, taken, log_determinants = solution
        z = normalised(features.float(), self.normalization) @ white
        squared = [
            (about := z - mean).square().sum(dim=1) - (about @ directions.T).square().sum(dim=1)
            for mean, directions in zip(means, taken, strict=True)
        ]
        return -0.5 * (torch.stack(squared, dim=1) + log_determinants)
