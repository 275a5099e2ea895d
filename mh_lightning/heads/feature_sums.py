"""Heads that are affine maps of features h, solved from the sums of their products and of each class."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import require
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.functional.ridge import Sums, best_regression
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.packed_gram import PackedGram


class FeatureSums(ClosedFormHead):
    r"""Sums of :math:`h h^\top` and :math:`h y^\top`, y the one-hot classes.

    Args:
        num_features: n.
        num_classes: C.
        size: d, of h.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; or "none".

    Attributes:
        gram: sum of h hᵀ, a `PackedGram`, float32.
        class_sums: sum of h yᵀ, (d, C), float32.
    """

    answers_with: ClassVar[tuple[str, ...] | None] = ()
    class_sums: Tensor

    def __init__(self, num_features: int, num_classes: int, size: int, normalization: str) -> None:
        super().__init__(num_features, num_classes)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        self.normalization = normalization
        self.gram = PackedGram(size, torch.float32)
        self.register_buffer("class_sums", torch.zeros(size, num_classes, dtype=torch.float32))
        # their squares are summed in float32
        self.largest = (2.0**50 if normalization == "none" else 2.0**126) / num_features

    @property
    def state_bytes(self) -> int:
        """Bytes of the sums."""
        return sum(sums.numel() * sums.element_size() for sums in (self.gram.strips, self.class_sums))

    @abstractmethod
    def hidden(self, features: Tensor) -> Tensor:
        """Features (b, n) to h (b, d), float32."""

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        hidden = self.hidden(features)
        self.gram.add(hidden)
        self.class_sums.T.index_add_(0, targets, hidden)

    @abstractmethod
    def solve(self) -> tuple[Tensor, ...]:
        """Weights (d, C) and biases (C,), float32; and those of a regression the leverage of its probes (p,)."""

    def regression(self) -> tuple[Tensor, ...]:
        """Those of the ridge regression that generalised cross-validation chooses; the biases are 0."""
        samples, probes = float(self.counts.sum()), self.hidden(self.probed()[0])
        found = best_regression(Sums(self.gram.whole(), self.class_sums.double()), samples, samples, probes)
        weights = found.weights.float()
        return weights, weights.new_zeros(self.num_classes), found.leverage

    def leverage(self, *solution: Tensor) -> Tensor | None:
        """That of the probes (p,), which a regression knows."""
        return solution[2] if len(solution) == 3 else None

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Affine maps of h, (b, C)."""
        weights, biases = solution[:2]
        return torch.addmm(biases, self.hidden(features), weights)


class RidgeRegression(FeatureSums):
    r"""One ridge regression of one-hot classes: :math:`o = h^\top (G + \lambda I)^{-1} \sum h y^\top`.

    With z the normalised features, :math:`h = [z, 1]`, :math:`G = \sum h h^\top` and :math:`\lambda` from generalised
    cross-validation, exact from the sums.

    Source: Hoerl and Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", Technometrics 12, 1970;
    Golub, Heath and Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter",
    Technometrics 21, 1979.

    Args:
        num_features: n.
        num_classes: C.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` divided by its length; or "l2", ``x / ||x||``.

    Example:
        >>> head = RidgeRegression(2, 2)
        >>> x, targets = torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20)
        >>> head.update(x, targets)
        >>> head(x[:2]).argmax(dim=1)
        tensor([0, 1])
    """

    def __init__(self, num_features: int, num_classes: int, normalization: str = "sqrt") -> None:
        require("normalization", normalization, one_of=("sqrt", "l2"))
        super().__init__(num_features, num_classes, num_features + 1, normalization)

    def hidden(self, features: Tensor) -> Tensor:
        """Features (b, n) to [z, 1], (b, n + 1)."""
        return F.pad(normalised(features.float(), self.normalization), (0, 1), value=1.0)

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (n + 1, C), and biases of 0."""
        return self.regression()
