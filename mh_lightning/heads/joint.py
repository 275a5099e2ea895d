"""Upper bounds: classifiers that keep every sample, and are fit to all of them together."""

from typing import ClassVar

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import require
from mh_lightning.functional.kernel_ridge import neighbourhood, responses
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.drawn_projection import seed_of_run
from mh_lightning.heads.random_projection import draw_held_out

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))  # of kernel ridge regression
STRENGTHS = tuple(10.0**exponent for exponent in range(-1, 5))  # of fit beside penalty, of logistic regression


class JointHead(ClosedFormHead):
    """Keeps the normalised features of all samples, so its state grows; a fifth of them, drawn by the seed, chooses the
    penalty, and all are fit with it.

    Args:
        num_features: n.
        num_classes: C.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; or "none".
        seed: in [0, 2**32), of what is held out; by default torch's initial seed, which that of a run sets.

    Attributes:
        samples: (N, n), float32.
        classes: (N,).
    """

    keeps_samples: ClassVar[bool] = True
    sized_by_state: ClassVar[tuple[str, ...]] = ("samples", "classes")
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    samples: Tensor
    classes: Tensor
    seed: Tensor

    def __init__(
        self, num_features: int, num_classes: int, normalization: str = "sqrt", seed: int | None = None
    ) -> None:
        super().__init__(num_features, num_classes)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        self.normalization = normalization
        self.register_buffer("seed", torch.tensor(seed_of_run(seed)))
        self.register_buffer("samples", torch.zeros(0, num_features, dtype=torch.float32))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))
        self.largest = 2.0**126 / num_features

    @property
    def state_bytes(self) -> int:
        """Bytes of all samples."""
        return self.samples.numel() * 4 + self.classes.numel() * 8

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Keep features (b, n) of classes (b,)."""
        self.samples = torch.cat([self.samples, normalised(features.float(), self.normalization)])
        self.classes = torch.cat([self.classes, targets])

    def parts(self) -> tuple[Tensor, Tensor]:
        """Rows to fit and rows that are held out, both of them all samples if either would be none."""
        held_out = torch.from_numpy(draw_held_out(int(self.seed), 0, len(self.classes))).to(self.classes.device)
        if held_out.all() or not held_out.any():
            held_out = torch.ones_like(held_out)
            return held_out, held_out
        return ~held_out, held_out

    def answers_left_out(self, *solution: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (p, C) of the samples that were held out, with the penalty that was chosen on them, and their classes
        (p,).
        """
        return solution[-1], self.classes[self.parts()[1]]


class JointLogisticRegression(JointHead):
    """Multinomial logistic regression of all samples, by L-BFGS: scikit-learn's `LogisticRegression`, with the strength
    C, a power of 10 from 0.1 to 10,000, that has the least loss on held-out samples.

    Args:
        options: of `JointHead`.

    Example:
        >>> head = JointLogisticRegression(2, 2, seed=0)
        >>> head.update(torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20))
        >>> head(torch.eye(2)).argmax(dim=1)
        tensor([0, 1])
    """

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (C, n) and biases (C,), and logits of the samples held out (p, C)."""
        fit, held_out = self.parts()
        answers = []
        for strength in STRENGTHS:
            weights, biases = self._fitted(fit, strength)
            answers.append(torch.addmm(biases, self.samples[held_out], weights.T))
        losses = [float(F.cross_entropy(logits, self.classes[held_out])) for logits in answers]
        best = losses.index(min(losses))
        return *self._fitted(torch.ones_like(fit), STRENGTHS[best]), answers[best]

    def _fitted(self, rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        weights = self.samples.new_zeros(self.num_classes, self.num_features)
        biases = self.samples.new_full((self.num_classes,), -100.0)  # of classes that were not seen
        classes = self.classes[rows]
        seen = torch.bincount(classes).nonzero().flatten()
        biases[seen] = 0.0
        if len(seen) > 1:
            model = LogisticRegression(C=strength, max_iter=1000)
            model.fit(self.samples[rows].cpu().numpy(), classes.cpu().numpy())
            found, offsets = (torch.from_numpy(part).to(weights) for part in (model.coef_, model.intercept_))
            if len(seen) == 2:  # one row for both
                found, offsets = torch.cat([-found, found]) / 2, torch.cat([-offsets, offsets]) / 2
            weights[seen], biases[seen] = found, offsets
        return weights, biases

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Logits (b, C)."""
        weights, biases = solution[:2]
        return torch.addmm(biases, normalised(features.float(), self.normalization), weights.T)


class JointKernelRidge(JointHead):
    r"""Kernel ridge regression of all samples, :math:`o(x) = k(x, X) (K + \lambda I)^{-1} Y`, with a Gaussian kernel.

    It needs N² numbers and N³ operations. The penalty, of 13 candidates, is that of the least squared error on held-out
    samples.

    Args:
        num_features: n.
        num_classes: C.
        width: w of the kernel, at least 1e-6 and at most 1e6, in squared distances within which a tenth of the samples
            lie.
        options: of `JointHead`.

    Example:
        >>> head = JointKernelRidge(1, 2, normalization="none", seed=0)
        >>> x = torch.linspace(0, 3, 301).unsqueeze(1)
        >>> head.update(x, x.squeeze(1).long() % 2)
        >>> head(torch.tensor([[0.5], [1.5], [2.5]])).argmax(dim=1)
        tensor([0, 1, 0])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        width: float = 1.4,
        normalization: str = "sqrt",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes, normalization, seed)
        require("width", width, at_least=1e-6, at_most=1e6)
        self.width = width

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (N, C), samples (N, n), the width, and answers to the samples held out (p, C), in float64."""
        samples, targets = self.samples.double(), F.one_hot(self.classes, self.num_classes).double()
        order = torch.randperm(len(samples), generator=torch.Generator("cpu").manual_seed(int(self.seed)), device="cpu")
        width = self.width * neighbourhood(samples[order.to(samples.device)])
        kernel = responses(samples, samples, width)
        fit, held_out = self.parts()
        across, inner = kernel[held_out][:, fit], kernel[fit][:, fit]
        answers = [across @ _kernel_weights(inner, targets[fit], penalty) for penalty in PENALTIES]
        errors = [float((one - targets[held_out]).square().sum()) for one in answers]
        best = errors.index(min(errors))
        return _kernel_weights(kernel, targets, PENALTIES[best]), samples, samples.new_tensor(width), answers[best]

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Regressions (b, C)."""
        weights, samples, width = solution[:3]
        return responses(normalised(features.double(), self.normalization), samples, width) @ weights


def _kernel_weights(kernel: Tensor, targets: Tensor, penalty: float) -> Tensor:
    regularised = kernel.clone()
    regularised.diagonal().add_(penalty)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(regularised))
