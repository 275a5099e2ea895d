"""Regression and discriminants on random features, from packed sums in float32."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mh_lightning.errors import require
from mh_lightning.functional.normalization import normalised
from mh_lightning.heads.drawn_projection import DrawnProjection, seed_of_run
from mh_lightning.heads.feature_sums import FeatureSums
from mh_lightning.heads.random_projection import ridge_weights

FEATURES = ("relu", "fourier")
ROUNDING = 8.0  # float32's, of the trace of sums: more than their eigenvalues can be off


class RandomFeatureHead(FeatureSums):
    r"""Random features h of normalised features z, and their sums.

    "relu": :math:`h = \mathrm{relu}(P^\top z)`. "fourier": :math:`h = \sqrt2 \cos(\sqrt{2 / w}\, P^\top z + b)`, whose
    products are about :math:`D \exp(-\|z - z'\|^2 / w)`. P is drawn from N(0, 1) and b from [0, 2π).

    Source: Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007, of the second.

    Args:
        num_features: n.
        num_classes: C.
        num_projections: D, at least 1.
        kind: of features, "relu" or "fourier".
        width: w of "fourier", above 0. By default what is about the median squared distance between two images'
            features of length 1.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; or "none".
        seed: in [0, 2**32), of P and b; by default torch's initial seed, which that of a run sets.

    Attributes:
        projection: P, a `DrawnProjection`.
        phases: b, (D,).
    """

    answers_with: ClassVar[tuple[str, ...] | None] = ("projection", "phases")
    phases: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_projections: int = 5000,
        kind: str = "relu",
        width: float = 1.1,
        normalization: str = "sqrt",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes, num_projections, normalization)
        require("kind", kind, one_of=FEATURES)
        require("width", width, above=0, below=math.inf)
        self.num_projections, self.kind, self.width = num_projections, kind, width
        self.projection = DrawnProjection(num_features, num_projections, seed)
        generator = torch.Generator("cpu").manual_seed(seed_of_run(seed) + 1)
        phases = 2 * math.pi * torch.rand(num_projections, generator=generator, device="cpu", dtype=torch.float32)
        self.register_buffer("phases", phases.to(self.counts.device))

    def hidden(self, features: Tensor) -> Tensor:
        """Features (b, n) to h (b, D), float32."""
        projected = self.projection(normalised(features.float(), self.normalization))
        if self.kind == "relu":
            return torch.relu(projected)
        return math.sqrt(2) * torch.cos(math.sqrt(2 / self.width) * projected + self.phases)


class RandomFeatureRidge(RandomFeatureHead):
    r"""Ridge regression from random features to one-hot classes: :math:`o = h^\top (G + \lambda I)^{-1} \sum h y^\top`.

    The ridge is chosen by generalised cross-validation, which needs one Gram matrix where `RandomProjectionRidge`, as
    published, needs two. With "relu" this is RanPAC on normalised features.

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.

    Args:
        options: of `RandomFeatureHead`.

    Example:
        >>> head = RandomFeatureRidge(2, 2, num_projections=50, seed=0)
        >>> x, targets = torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20)
        >>> head.update(x, targets)
        >>> head(x[:2]).argmax(dim=1)
        tensor([0, 1])
    """

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (D, C), and biases of 0."""
        return self.regression()


class RandomFeatureDiscriminant(RandomFeatureHead):
    r"""Linear discriminants of random features: class means and the covariance that all classes share.

    With :math:`\mu_c` the means of h and :math:`S = (G - \sum_c N_c \mu_c \mu_c^\top) / N`, shrunk to
    :math:`\hat S = (1 - s) S + s \frac{\mathrm{tr} S}{D} I`, logits are
    :math:`\mu_c^\top \hat S^{-1} h - \frac12 \mu_c^\top \hat S^{-1} \mu_c`. With "fourier" this is KLDA. What is
    added to S is at least what rounding can take from its eigenvalues.

    Source: Momeni, Mazumder and Liu, "Continual Learning Using a Kernel-Based Method Over Foundation Models", AAAI
    2025.

    Args:
        num_features: n.
        num_classes: C.
        num_projections: D.
        kind: of features.
        shrinkage: s, in (0, 1].
        options: of `RandomFeatureHead`.

    Example:
        >>> head = RandomFeatureDiscriminant(2, 2, num_projections=50, seed=0)
        >>> x, targets = torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20)
        >>> head.update(x, targets)
        >>> head(x[:2]).argmax(dim=1)
        tensor([0, 1])
    """

    discriminants: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_projections: int = 5000,
        kind: str = "fourier",
        shrinkage: float = 0.01,
        width: float = 1.1,
        normalization: str = "sqrt",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes, num_projections, kind, width, normalization, seed)
        require("shrinkage", shrinkage, above=0, at_most=1)
        self.shrinkage = shrinkage

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (D, C) and biases (C,)."""
        counts = self.counts.double()
        means = self.class_sums.double() / counts.clamp_min(1)
        gram = self.gram.whole()
        covariance = (gram - (means * counts) @ means.T) / counts.sum()
        spread = float(covariance.trace()) / len(covariance)
        rounding = ROUNDING * torch.finfo(torch.float32).eps * float(gram.trace()) / float(counts.sum())
        if spread <= rounding / len(covariance):  # no class has samples that differ, as far as sums tell
            covariance, spread = torch.eye(len(covariance)).to(covariance), 1.0
        ridge = max(self.shrinkage * spread, rounding)
        weights = ridge_weights((1 - self.shrinkage) * covariance, means.T, ridge)
        assert weights is not None
        return weights.T.float(), (-0.5 * (weights * means.T).sum(dim=1)).float()
