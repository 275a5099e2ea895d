"""Memory units that hold ridge regressions."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning import functional
from mh_lightning.errors import UserError, require
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised, rooted_and_length
from mh_lightning.functional.ridge import (
    BlendBound,
    Spectrum,
    candidate_ridges,
    cross_validation_score,
    fits_of,
    groups_of_units,
)
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.random_projection import (
    draw_projection,
    projection_of_state,
    ridge_weights,
    seed_of_projections,
)
from mh_lightning.heads.settling_keys import Attracted, SettlingKeys

AUTO = "auto"
NO_SPREAD = 1e-7  # of the largest mean: what varies by less was lost when features were float32
LARGEST_IN_FLOAT32 = 2.0**126  # as keys are: half of what differences between them may be


class RidgeMemoryUnits(ClosedFormHead):
    r"""A Memory Head whose units are ridge regressions of the samples that their keys attract, in one pass.

    Unit j keeps :math:`A_j = \sum_i \alpha_{ij} h_i h_i^\top` and :math:`C_j = \sum_i \alpha_{ij} h_i y_i^\top`, where
    y are one-hot classes and :math:`\alpha` is the attention of `SettlingKeys`. As the weights of a sample sum to 1,
    the sums of all units together are those of an ordinary ridge regression, the shared unit, at no cost. It is always
    on, and the others answer what it leaves over:

    .. math::
        W_0 = \Bigl(\sum_j A_j + \lambda_0 I\Bigr)^{-1} \sum_j C_j, \qquad
        W_j = (A_j + \lambda I)^{-1} (C_j - A_j W_0), \qquad
        o = \Bigl(W_0 + \sum_j \alpha_j W_j\Bigr)^\top h

    With one unit, the shared one is all there is. The ridges are chosen by generalised cross-validation, which needs
    no samples: first :math:`\lambda_0` of 29 candidates for the shared unit alone, or of as many more as sums in
    float64 have digits for, then :math:`\lambda` of the same and infinity, by a bound on the error of the blend: where
    it promises little, :math:`W_j = 0`, and one regression answers. Units that hold the sums of fewer samples than D
    answer together with their neighbours. See `mh_lightning.functional.ridge`.

    Units that are re-used hand their sums over to their nearest neighbour, so that nothing is lost.

    Source: the layer is that of Tiezzi et al., "Memory Head for Pre-Trained Backbones in Continual Learning", CoLLAs
    2024, section 3, but for its units; closed-form units are this project's, see ``docs/ridge_memory_head.md``. With
    one unit and projections it is McDonnell et al., "RanPAC", NeurIPS 2023.

    Args:
        num_features: n.
        num_classes: C.
        key_mem_units: m, at least 1.
        delta: units, at least 1, that a sample attends to, all if there are fewer.
        ridge: :math:`\lambda = \lambda_0`, or "auto".
        shared_unit: False leaves the answer to the units alone, :math:`W_0 = 0`.
        normalization: of features x, before all else: "none"; "l2", x / ||x||; "sqrt", the same of sign(x) sqrt(|x|),
            which is better for the non-negative features of most backbones. Of points in a plane, take "none": x minus
            the mean of all samples, over the root of their mean variance, which are known when predictions are asked
            for, so that neither an offset nor a unit of measure matters, up to offsets of a million times the spread;
            a sample that is farther from the others than that leaves them no digits.
        num_projections: D for :math:`h = \mathrm{relu}(P^\top x)` with P drawn from N(0, 1); by default, h is x with a
            constant 1 at its end, D = n + 1. With "none", they are of x as it came: an offset costs no digits, but
            beside a large one h is linear in x, or 0. `projections_beside` are alike.
        projections_beside: D, at least 1, of one more regression, of :math:`\mathrm{relu}(P^\top x)` for all samples,
            beside the units; the answer is the mean of both. As many as `num_projections` would be the same.
        seed: of P; by default torch's initial seed, which that of a run sets, or that of a state which is loaded.
        settle: samples that a key moves with, see `SettlingKeys`.
        tau_mu: wins below which a unit can be dead.
        tau_eta: age from which it is, in samples.
        max_bytes: refuse to keep a state of more bytes.

    Attributes:
        keys: the keys, a `SettlingKeys`.
        gram: all A_j, (m, D, D), float32, or float64 with the normalization "none", of x as it came; regressions are
            solved for, and answer, in the same precision.
        class_sums: all C_j, (m, D, C), float64.
        overlap: :math:`\sum_i \alpha_i \alpha_i^\top`, (m, m), float64: its rows sum to the sums of the alphas, and the
            sums of their squares are on its diagonal.
        ridge: :math:`\lambda_0, \lambda` of the last solution, (2,).
        beside: the regression of `projections_beside`, `RidgeMemoryUnits` with one unit, or None.
        state_bytes: bytes of the state.

    Raises:
        UserError: if options are out of range, the state would be larger than `max_bytes`, or the sums cannot be solved
            with the ridge that was given.

    Example:
        >>> head = RidgeMemoryUnits(1, 2, key_mem_units=3, normalization="none")
        >>> x = torch.linspace(0, 3, 301).unsqueeze(1)
        >>> head.update(x, x.squeeze(1).long() % 2)  # which no linear map can tell
        >>> head(torch.tensor([[0.5], [1.5], [2.5]])).argmax(dim=1)
        tensor([0, 1, 0])
    """

    gram: Tensor
    class_sums: Tensor
    overlap: Tensor
    ridge: Tensor
    seed: Tensor
    projection: Tensor | None
    _described = "all units together"

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        key_mem_units: int = 10,
        delta: int = 2,
        ridge: float | str = AUTO,
        shared_unit: bool = True,
        normalization: str = "sqrt",
        num_projections: int | None = None,
        projections_beside: int | None = None,
        seed: int | None = None,
        settle: int = 10,
        tau_mu: int = 10,
        tau_eta: int = 1000,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes)
        require("ridge", ridge, at_least=0, below=math.inf, or_text=AUTO)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        require("projections_beside", projections_beside, at_least=1)
        self.given_ridge, self.shared_unit, self.normalization = ridge, shared_unit, normalization
        self.given_seed = seed
        seed = seed_of_projections(seed)
        projection = None if num_projections is None else draw_projection(num_features, num_projections, seed)
        number = torch.float64 if normalization == "none" else torch.float32  # which may not hold squares of any x
        self.register_buffer(
            "projection", None if projection is None else projection.to(self.counts.device, number), persistent=False
        )
        self.register_buffer("seed", torch.tensor(seed))
        size = num_features + 1 if projection is None else projection.shape[1]
        self.keys = SettlingKeys(key_mem_units, num_features, delta, settle, tau_mu, tau_eta, inherited=size)
        self.largest = LARGEST_IN_FLOAT32 / num_features
        self.state_bytes = bytes_of_units(num_features, num_classes, key_mem_units, size, number)
        if projections_beside is not None:
            self.state_bytes += bytes_of_units(num_features, num_classes, 1, projections_beside, number)
        if max_bytes is not None and self.state_bytes > max_bytes:
            beside = "" if projections_beside is None else f" and of {projections_beside} projections_beside"
            raise UserError(
                f"max_bytes={max_bytes}: the Gram matrices (each {size} x {size}), class sums and keys of "
                f"{key_mem_units} units{beside} need {self.state_bytes} bytes; fewer key_mem_units or projections "
                "would do."
            )
        self.beside = None
        if projections_beside is not None:
            self.beside = RidgeMemoryUnits(num_features, num_classes, 1, ridge=ridge, normalization=normalization,
                                           num_projections=projections_beside, seed=self.given_seed)  # fmt: skip
            self.beside._described = "projections_beside"
        self.register_buffer("gram", torch.zeros(key_mem_units, size, size, dtype=number))
        self.register_buffer("class_sums", torch.zeros(key_mem_units, size, num_classes, dtype=torch.float64))
        self.register_buffer("overlap", torch.zeros(key_mem_units, key_mem_units, dtype=torch.float64))
        self.register_buffer("ridge", torch.zeros(2, dtype=torch.float64))

    def normalise(self, features: Tensor) -> Tensor:
        """What keys match, (b, n), in the precision of `gram`."""
        return normalised(features.to(self.gram.dtype), self.normalization)

    def project(self, z: Tensor) -> Tensor:
        """Normalised features (b, n) to h (b, D)."""
        return F.pad(z, (0, 1), value=1.0) if self.projection is None else torch.relu(z @ self.projection)

    # --- learning

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,), one after the other."""
        z = self.normalise(features)
        hidden = self.project(z)
        alphas, moves = self.keys.learn(z) if len(self.gram) > 1 else all_to_one(len(z), z.device)
        for source, target, share in moves:
            for sums in (self.class_sums, self.gram, self.overlap, self.overlap.T):
                sums[target] += share * sums[source]
                sums[source] *= 1 - share
        exact = alphas.double()
        self.overlap.addmm_(exact.T, exact)
        for unit in alphas.any(dim=0).nonzero().flatten().tolist():
            rows = alphas[:, unit].nonzero().flatten()
            attracted = hidden[rows]
            weighted = attracted * alphas[rows, unit].unsqueeze(1)
            self.gram[unit].addmm_(weighted.T, attracted)
            self.class_sums[unit].T.index_add_(0, targets[rows], weighted.double())
        if self.beside is not None:
            self.beside.update(features, targets)
            self.beside.settle()

    # --- solving

    def solve(self) -> tuple[Tensor, ...]:
        """What `_solve_units` finds, and the regression beside the units, if there is one."""
        return (*self._solve_units(), *(() if self.beside is None else self.beside.solve()))

    def _solve_units(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of all units, the shared one's added to each, side by side: (D, m C); (D, C) if there is one unit.

        As the alphas of a sample sum to 1, this answers as the shared unit and the blend of the others together do.
        Without projections, those that tell how near the k keys are stand beside them: (D, m C + k). The weights are of
        (x - origin) / length; origin (n,) and length () are the other two.
        """
        total, class_sums = self.total_gram(), self.class_sums.sum(dim=0)
        to_standard, origin, length = self._standardisation(total)
        rounding = torch.finfo(self.gram.dtype).eps * total.trace() / length**2
        total, class_sums = to_standard @ total @ to_standard.T, to_standard @ class_sums
        samples = self.counts.sum().double()
        spectrum, ridges = None, self.ridge.new_tensor([])
        if self.given_ridge == AUTO:
            spectrum = Spectrum.of(total)
            ridges = candidate_ridges(spectrum.values[-1], rounding)
            errors, freedom = fits_of(spectrum, class_sums, samples, ridges)
            self.ridge[0] = ridges[cross_validation_score(errors, freedom, samples).argmin()]
        else:
            self.ridge.fill_(float(self.given_ridge))
        shared = self._weights(total, class_sums, 0, self._described)
        if len(self.class_sums) == 1:
            return shared.to(self.gram.dtype), origin, length
        if not self.shared_unit:
            shared, spectrum = torch.zeros_like(shared), None
        groups = groups_of_units(self.keys.K, self.overlap, len(total))

        def sums_of(group: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            gram = to_standard @ self.gram[group].sum(dim=0, dtype=torch.float64) @ to_standard.T
            sums = to_standard @ self.class_sums[group].sum(dim=0)
            return gram, sums, sums - gram @ shared

        if self.given_ridge == AUTO:
            bound = BlendBound(ridges, spectrum, self.ridge[0])
            for group in groups:
                gram, sums, residual = sums_of(group)
                weight, squares = self.overlap[group].sum(), self.overlap[group][:, group].sum()
                left_over = weight - (shared * (sums + residual)).sum()
                bound.add(gram, residual, left_over, weight, squares / weight)
            self.ridge[1] = bound.best()
        units = torch.zeros_like(self.class_sums)
        for group in groups if self.ridge[1] < math.inf else ():
            gram, _, residual = sums_of(group)
            units[group] = self._weights(gram, residual, 1, f"memory units {group}")
        weights = (units + shared).transpose(0, 1).flatten(1)
        if self.projection is None:
            weights = torch.cat([weights, self.keys.nearness_weights(origin, length)], dim=1)
        return weights.to(self.gram.dtype), origin, length

    def _standardisation(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T (D, D) that makes [(x - origin) / length, 1] of h = [x, 1]; origin (n,) and length ().

        They are the mean and the root of the mean variance of all samples where x is not normalised, else 0 and 1.
        """
        origin, length = total.new_zeros(self.num_features), total.new_ones(())
        transform = torch.eye(len(total), dtype=total.dtype, device=total.device)
        if self.normalization == "none" and self.projection is None:
            samples = total[-1, -1]
            origin = total[-1, :-1] / samples
            variance = (total.diagonal()[:-1] / samples - origin.square()).mean()
            scale = origin.abs().amax()
            length = variance.clamp_min(0).sqrt()
            length = torch.where(length > NO_SPREAD * scale, length, torch.where(scale > 0, scale, 1.0))
            transform[:-1] /= length
            transform[:-1, -1] = -origin / length
        return transform, origin, length

    def total_gram(self) -> Tensor:
        """Gram matrix of all samples, (D, D), in float64."""
        return self.gram.sum(dim=0, dtype=torch.float64)

    def _weights(self, gram: Tensor, products: Tensor, which: int, of: str) -> Tensor:
        """Weights (D, C); rounding can make a ridge too small that was chosen, then the next decade is taken."""
        weights = ridge_weights(gram, products.T, float(self.ridge[which]))
        while weights is None and self.given_ridge == AUTO and self.ridge[which] < math.inf:
            self.ridge[which] *= 10
            weights = ridge_weights(gram, products.T, float(self.ridge[which]))
        if weights is None:
            values = torch.linalg.eigvalsh(gram)
            condition = float(values[-1]) / max(float(values[0]), torch.finfo(gram.dtype).eps * float(values[-1]))
            raise UserError(
                f"ridge={self.given_ridge}: the sums of {of} cannot be solved, since their condition number is at "
                f"least {condition:.0e}; {1e-6 * float(values[-1]):.1g} or more, or 'auto', would do."
            )
        return weights.T

    # --- answers

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Regressions (b, C)."""
        answers = self._answers_of_units(features, *solution[:3])
        return answers if self.beside is None else (answers + self.beside.logits(features, *solution[3:])) / 2

    def _answers_of_units(self, features: Tensor, weights: Tensor, origin: Tensor, length: Tensor) -> Tensor:
        units = len(self.class_sums)
        if self.projection is None:  # one product for answers and keys; the last of h is 1
            if self.normalization == "none":
                features = (features.double() - origin) / length
            x, lengths = rooted_and_length(features.to(self.gram.dtype), self.normalization)
            products = x @ weights[:-1]
            products = weights[-1] + products if lengths is None else torch.addcdiv(weights[-1], products, lengths)
            answers, nearness = products.tensor_split([units * self.num_classes], dim=1)
            attention = self.keys.attend_to_nearest(nearness) if units > 1 else None
        else:
            z = self.normalise(features)
            answers = self.project(z) @ weights
            attention = self.keys.attend(z) if units > 1 else None
        if attention is None:
            return answers
        alphas = functional.spread(attention.alphas, attention.units, units)
        return torch.bmm(alphas.to(answers.dtype), answers.view(len(features), units, self.num_classes)).squeeze(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.projection is not None:
            self.projection = projection_of_state(self.projection, self.seed, self.given_seed, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def all_to_one(samples: int, device: torch.device) -> Attracted:
    """One unit attracts all samples, wherever its key is.

    Example:
        >>> all_to_one(2, torch.device("cpu")).alphas
        tensor([[1.],
                [1.]])
    """
    return Attracted(torch.ones(samples, 1, dtype=torch.float32, device=device), [])


def bytes_of_units(
    num_features: int, num_classes: int, units: int, size: int, number: torch.dtype = torch.float32
) -> int:
    """Bytes of the Gram matrices (size, size), class sums (size, C) and keys (n,) of units.

    Example:
        >>> bytes_of_units(1280, 10, 1, 5000)  # RanPAC in one Gram matrix
        100405120
    """
    return units * (number.itemsize * size**2 + 8 * size * num_classes + 4 * num_features)
