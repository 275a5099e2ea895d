"""Least squares on many random projections, of which only the strongest directions are kept."""

from typing import ClassVar

import torch
from torch import Tensor

from mh_lightning.errors import require
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.drawn_projection import DrawnProjection

NO_VALUE = 1e-4  # singular values that are a smaller part of the largest are rounding in float32


class TruncatedProjection(ClosedFormHead):
    r"""Least squares from :math:`h = \mathrm{relu}(P^\top z)` to one-hot classes, in the span of the r strongest
    directions of h.

    With the truncated singular value decomposition :math:`H \approx U S V^\top` of all samples' h and
    :math:`B = \sum_i h_i y_i^\top`, logits are :math:`o = B^\top V S^{-2} V^\top h`. V and S are updated with each
    chunk of samples: the strongest directions of :math:`[S V^\top; H']`, found from its products in float64.

    Source: Peng et al., "LoRanPAC: Low-rank Random Features and Pre-trained Models for Bridging Theory and Practice in
    Continual Learning", ICLR 2025.

    Args:
        num_features: n.
        num_classes: C.
        num_projections: D, at least 1.
        rank: r, at least 1.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; or "none".
        seed: in [0, 2**32), of P; by default torch's initial seed, which that of a run sets.

    Attributes:
        projection: P, a `DrawnProjection`.
        directions: S Vᵀ, (r, D), float32.
        class_sums: B, (D, C), float32.

    Example:
        >>> head = TruncatedProjection(2, 2, num_projections=50, rank=5, seed=0)
        >>> x, targets = torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20)
        >>> head.update(x, targets)
        >>> torch.allclose(head(x[:2]), torch.eye(2), atol=1e-5)
        True
    """

    answers_with: ClassVar[tuple[str, ...] | None] = ("projection",)
    directions: Tensor
    class_sums: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_projections: int = 10000,
        rank: int = 500,
        normalization: str = "sqrt",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes)
        require("rank", rank, at_least=1, whole=True)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        self.num_projections, self.rank, self.normalization = num_projections, rank, normalization
        self.projection = DrawnProjection(num_features, num_projections, seed)
        kept = min(rank, num_projections)
        self.register_buffer("directions", torch.zeros(kept, num_projections, dtype=torch.float32))
        self.register_buffer("class_sums", torch.zeros(num_projections, num_classes, dtype=torch.float32))
        self.largest = 2.0**60 / num_features

    @property
    def state_bytes(self) -> int:
        """Bytes of directions and sums."""
        return sum(part.numel() * part.element_size() for part in (self.directions, self.class_sums))

    def hidden(self, features: Tensor) -> Tensor:
        """Features (b, n) to h (b, D), float32."""
        return torch.relu(self.projection(normalised(features.float(), self.normalization)))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        hidden = self.hidden(features)
        self.class_sums.T.index_add_(0, targets, hidden)
        stacked = torch.cat([self.directions, hidden])
        vectors = torch.linalg.eigh((stacked @ stacked.T).double()).eigenvectors
        strongest = vectors[:, -len(self.directions) :].flip(1).float()
        self.directions[: strongest.shape[1]] = strongest.T @ stacked

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (D, C), and the leverage of the probes (p,)."""
        squares = self.directions.double().square().sum(dim=1)
        used = self.directions[squares > NO_VALUE**2 * squares.amax()].double()
        squares = used.square().sum(dim=1, keepdim=True)
        weights = used.T @ ((used @ self.class_sums.double()) / squares.square())
        probes = used @ self.hidden(self.probed()[0]).double().T
        return weights.float(), (probes / squares).square().sum(dim=0)

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Regressions (b, C)."""
        return self.hidden(features) @ solution[0]

    def leverage(self, *solution: Tensor) -> Tensor:
        """That of the probes (p,)."""
        return solution[1]
