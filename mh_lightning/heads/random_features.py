"""Regression and discriminants on random features, from packed sums in float32."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from mh_lightning.errors import require
from mh_lightning.functional.kernel_ridge import Sums, best_regression
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.packed_gram import PackedGram
from mh_lightning.heads.random_projection import (
    draw_projection,
    projection_of_state,
    ridge_weights,
    seed_of_projections,
)

FEATURES = ("relu", "fourier")
ROUNDING = 8.0  # float32's, of the trace of sums: more than their eigenvalues can be off


class RandomFeatureHead(ClosedFormHead):
    r"""Random features h of normalised features z, and the sums of :math:`h h^\top` and :math:`h y^\top`.

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
        normalization: of features x: "sqrt", sign(x) sqrt(|x|) divided by its length; "l2", x / ||x||; or "none".
        seed: in [0, 2**32), of P and b; by default torch's initial seed, which that of a run sets.

    Attributes:
        gram: sum of h hᵀ, a `PackedGram`, float32.
        class_sums: sum of h yᵀ, (D, C), float32.
        projection: P, (n, D), drawn from the seed. It is no part of the state, but b and the seed are.
    """

    class_sums: Tensor
    projection: Tensor
    phases: Tensor
    seed: Tensor

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
        super().__init__(num_features, num_classes)
        require("kind", kind, one_of=FEATURES)
        require("width", width, above=0, below=math.inf)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        self.kind, self.width, self.normalization = kind, width, normalization
        self.given_seed = seed
        seed = seed_of_projections(seed)
        projection = draw_projection(num_features, num_projections, seed)
        generator = torch.Generator("cpu").manual_seed(seed + 1)
        phases = 2 * math.pi * torch.rand(num_projections, generator=generator, device="cpu", dtype=torch.float32)
        self.register_buffer("projection", projection.to(self.counts.device), persistent=False)
        self.register_buffer("phases", phases.to(self.counts.device))
        self.register_buffer("seed", torch.tensor(seed))
        self.gram = PackedGram(num_projections, torch.float32)
        self.register_buffer("class_sums", torch.zeros(num_projections, num_classes, dtype=torch.float32))
        self.largest = 2.0**126 / num_features

    @property
    def state_bytes(self) -> int:
        """Bytes of the sums."""
        return sum(sums.numel() * sums.element_size() for sums in (self.gram.strips, self.class_sums))

    def hidden(self, features: Tensor) -> Tensor:
        """Features (b, n) to h (b, D), float32."""
        projected = normalised(features.float(), self.normalization) @ self.projection
        if self.kind == "relu":
            return torch.relu(projected)
        return math.sqrt(2) * torch.cos(math.sqrt(2 / self.width) * projected + self.phases)

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        hidden = self.hidden(features)
        self.gram.add(hidden)
        self.class_sums.T.index_add_(0, targets, hidden)

    @abstractmethod
    def solve(self) -> tuple[Tensor, ...]:
        """Weights (D, C) and biases (C,), float32."""

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Affine maps of h, (b, C)."""
        weights, biases = solution
        return torch.addmm(biases, self.hidden(features), weights)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.projection = projection_of_state(self.projection, self.seed, self.given_seed, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RandomFeatureRidge(RandomFeatureHead):
    r"""Ridge regression from random features to one-hot classes: :math:`o = h^\top (G + \lambda I)^{-1} \sum h y^\top`.

    The ridge is chosen by generalised cross-validation, which needs one Gram matrix where `RandomProjectionRidge`, as
    published, needs two. With "relu" this is RanPAC on normalised features.

    Source: McDonnell et al., "RanPAC", NeurIPS 2023.

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
        """Weights (D, C), and no biases."""
        samples = float(self.counts.sum())
        weights = best_regression(Sums(self.gram.whole(), self.class_sums.double()), samples, samples).weights.float()
        return weights, weights.new_zeros(self.num_classes)


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

    discriminants = True

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
