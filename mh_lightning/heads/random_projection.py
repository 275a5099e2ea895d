"""Ridge regression on randomly projected features."""

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.drawn_projection import DrawnProjection

EXPONENTS = range(-8, 9)  # of 10, the published ridges
HELD_OUT = 5  # one of so many samples chooses the ridge
DRAWS = 4  # of a step of Philox


class RandomProjectionRidge(ClosedFormHead):
    r"""Ridge regression from random features :math:`h = \mathrm{relu}(P^\top x)` to one-hot classes.

    .. math::
        G = \sum_i h_i h_i^\top, \qquad C = \sum_i h_i y_i^\top, \qquad W = (G + \lambda I)^{-1} C, \qquad o = W^\top h

    P is drawn once from N(0, 1). The ridge :math:`\lambda`, a power of 10 from -8 to 8, is the one whose weights from
    four fifths of the samples have the least squared error on the other fifth: one of the first five samples, one of
    the next five and so on, which the seed draws, see `draw_held_out`. Of both, only the sums :math:`G, C` are kept,
    which tell the error too, with :math:`N'` samples held out:

    .. math::
        \sum_i \|y_i - W^\top h_i\|^2 = N' - 2\,\mathrm{tr}(W^\top C') + \mathrm{tr}(W^\top G' W)

    The weights then come from all samples. The published code has 10,000 projections and chooses the ridge on the last
    fifth of the current task alone; here, it is chosen on a fifth of all samples so far, from a single pass. Before
    any is held out it is 1. So the order of the samples decides which of them choose the ridge, and nothing else but
    the unit.

    Features are in units (`ClosedFormHead.unit`), and so is :math:`\lambda`. The sums are in float64, where an offset
    of the features, or samples far from all others, leave the rest their digits, wherever they come in the stream;
    float32 would do for features without any, in half the memory and half the time. A feature so large that the
    rounding of its square would be above the largest ridge is refused.

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.

    Args:
        num_features: n.
        num_classes: C.
        num_projections: M, at least 1. The sums need 16 M² bytes, and to solve about 24 M² bytes more.
        seed: in [0, 2**32), of P and of what is held out; by default torch's initial seed, which that of a run sets,
            and that of a state which is loaded.

    Attributes:
        projection: P, a `DrawnProjection`, in float64.
        held_out: samples of each class that are held out, (C,).
        gram: G of what is fit and of what is held out, (2, M, M), in float64.
        class_sums: the transposed C of both, (2, C, M), in float64.
        ridge: the last choice of :math:`\lambda`, from which the next search starts; 0 before any.

    Raises:
        UserError: if options are out of range, or a state belongs to another seed.

    Example:
        >>> head = RandomProjectionRidge(2, 2, num_projections=50, seed=0)
        >>> x, targets = torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20)
        >>> head.update(x, targets)
        >>> head(x[:2]).argmax(dim=1)
        tensor([0, 1])
    """

    in_units: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ("projection",)
    held_out: Tensor
    gram: Tensor
    class_sums: Tensor
    ridge: Tensor

    def __init__(
        self, num_features: int, num_classes: int, num_projections: int = 5000, seed: int | None = None
    ) -> None:
        super().__init__(num_features, num_classes)
        self.num_projections = num_projections
        self.projection = DrawnProjection(num_features, num_projections, seed, torch.float64)
        rounding = torch.finfo(torch.float64).eps * num_features * num_projections  # of the square of a feature of 1
        self.largest = min(self.largest, math.sqrt(10.0 ** EXPONENTS[-1] / rounding))
        self.register_buffer("held_out", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("gram", torch.zeros(2, num_projections, num_projections, dtype=torch.float64))
        self.register_buffer("class_sums", torch.zeros(2, num_classes, num_projections, dtype=torch.float64))
        self.register_buffer("ridge", torch.tensor(0.0, dtype=torch.float64))

    def project(self, features: Tensor) -> Tensor:
        """Features (b, n) to h (b, M), in float64."""
        return torch.relu(self.projection(features))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        held_out = torch.from_numpy(draw_held_out(int(self.projection.seed), int(self.counts.sum()), len(targets)))
        held_out = held_out.to(targets.device)
        hidden = self.project(features)
        for part, rows in enumerate((~held_out, held_out)):
            self.gram[part].addmm_(hidden[rows].T, hidden[rows])
            self.class_sums[part].index_add_(0, targets[rows], hidden[rows])
        self.held_out += torch.bincount(targets[held_out], minlength=self.num_classes)

    def solve(self) -> tuple[Tensor, ...]:
        """Weights (C, M), with the best ridge, and the leverage of the probes (p,)."""
        best = self._best_exponent()
        gram, class_sums = self.gram.sum(dim=0), self.class_sums.sum(dim=0)
        probes = self.project(self.probed()[0])
        # rounding can make too little for all samples what was enough for four fifths of them
        for exponent in range(best, EXPONENTS.stop):
            solved = ridge_weights(gram, torch.cat([class_sums, probes]), 10.0**exponent)
            if solved is not None:
                self.ridge.fill_(10.0**exponent)
                return solved[: self.num_classes], (solved[self.num_classes :] * probes).sum(dim=1)
        raise UserError(
            f"num_projections={self.gram.shape[1]}: no ridge up to 1e8 lets the sums be solved; the features are too "
            "large, or hold NaN or infinite values, and must be scaled or mended."
        )

    def _best_exponent(self) -> int:
        (fit, gram), (class_sums_of_fit, class_sums) = self.gram, self.class_sums
        samples = int(self.held_out.sum())
        if samples == 0:
            return 0

        def error(exponent: int) -> float:
            weights = ridge_weights(fit, class_sums_of_fit, 10.0**exponent)
            if weights is None:
                return math.inf
            return samples + float((weights * (weights @ gram - 2 * class_sums)).sum())

        return best_exponent(error, round(math.log10(self.ridge)) if self.ridge else None)

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Regressions (b, C)."""
        return self.project(features) @ solution[0].T

    def leverage(self, *solution: Tensor) -> Tensor:
        """That of the probes (p,)."""
        return solution[1]


def draw_held_out(seed: int, first: int, samples: int) -> NDArray[np.bool_]:
    """Which samples of a stream are held out: one of each `HELD_OUT`, as the seed and its place in the stream decide,
    whatever comes in one batch.

    Args:
        seed: of the draw.
        first: place of the first sample in the stream, from 0.
        samples: how many, 1 at least.

    Example:
        >>> whole = draw_held_out(3, 0, 20)
        >>> whole.reshape(4, 5).sum(axis=1), bool((draw_held_out(3, 7, 13) == whole[7:]).all())
        (array([1, 1, 1, 1]), True)
    """
    groups, places = np.divmod(np.arange(first, first + samples), HELD_OUT)
    skipped = int(groups[0]) // DRAWS * DRAWS
    draws = np.random.Philox(key=seed).advance(skipped // DRAWS).random_raw(int(groups[-1]) - skipped + 1)
    held_out: NDArray[np.bool_] = draws[groups - skipped] % HELD_OUT == places
    return held_out


def ridge_weights(gram: Tensor, class_sums: Tensor, ridge: float) -> Tensor | None:
    """Weights (C, M) from G (M, M) and the transposed C (C, M), or None if rounding makes G indefinite.

    Example:
        >>> ridge_weights(torch.eye(1), torch.tensor([[4.0]]), 3.0)
        tensor([[1.]])
    """
    regularised = gram.clone()
    regularised.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    return None if bool(failed) else torch.cholesky_solve(class_sums.T, factor).T


def best_exponent(error: Callable[[int], float], last: int | None = None) -> int:
    """The exponent of the least error, of `EXPONENTS`.

    Decade by decade from the last choice, while the error becomes less. Without one, every fourth exponent and then
    two beside the best are tried first. A lesser minimum far from the one found can be missed.

    Args:
        error: of an exponent, infinite where there is none.
        last: choice.

    Example:
        >>> best_exponent(lambda exponent: abs(exponent - 3))
        3
    """
    errors = {} if last is None else {last: error(last)}
    if all(map(math.isinf, errors.values())):
        errors = {exponent: error(exponent) for exponent in EXPONENTS[::4]}
        best = min(errors, key=errors.__getitem__)
        errors |= {near: error(near) for near in (best - 2, best + 2) if near in EXPONENTS}
    while True:
        best = min(errors, key=errors.__getitem__)
        beside = [near for near in (best - 1, best + 1) if near in EXPONENTS and near not in errors]
        if not beside:
            return best
        errors |= {near: error(near) for near in beside}
