"""A normal distribution for each class's features, to draw features from when the samples are gone."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError, require
from mh_lightning.heads.base import check_classes, check_features

Covariance = Literal["full", "low_rank", "shared"]


class ClassGaussians(nn.Module):
    r"""Means and covariances of classes, gathered in one pass over their samples, class group after class group.

    Each class has features :math:`x \sim N(\mu_c, S_c + \epsilon I)`. Covariances are kept

    - "full": :math:`L_c` with :math:`L_c L_c^\top = S_c + \epsilon I`, 4 C n² bytes (1,000 classes of 768 features: 2.4
      GB);
    - "low_rank": :math:`F_c F_c^\top + \mathrm{diag}(v_c)`, with the `rank` first principal directions of :math:`S_c`
      and the variances that they leave over, 4 C n (rank + 1) bytes (with rank 32: 101 MB);
    - "shared": one S for all classes, :math:`S = \sum_c (N_c - 1) S_c / \sum_c (N_c - 1)`, 8 n² bytes (5 MB).

    Sums are in float64 on the features' device; the classes that are gathered at a time take 8 n² bytes each, and with
    "full" 4 n² more.

    Args:
        num_features: n.
        num_classes: C.
        covariance: how covariances are kept, "full", "low_rank" or "shared".
        rank: of "low_rank", at least 1.
        jitter: :math:`\epsilon`, added to the diagonal, above 0.

    Attributes:
        counts: samples of each class, (C,); 0 until the class was gathered.
        means: (C, n), in float64.

    Raises:
        UserError: if an option is out of range.

    Source: Zhang et al., "SLCA", ICCV 2023, section 3.3, with full covariances and a jitter of 1e-4.

    Example:
        >>> gaussians = ClassGaussians(2, 1, jitter=1e-9)
        >>> gaussians.gather([0], [(torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([0, 0]))])
        >>> gaussians.means
        tensor([[1., 1.]], dtype=torch.float64)
        >>> gaussians.covariance_of(0)
        tensor([[2.0000, 2.0000],
                [2.0000, 2.0000]], dtype=torch.float64)
    """

    same_on_all_ranks = True  # see `mh_lightning.distributed.state_kept_alike`
    counts: Tensor
    means: Tensor
    factors: Tensor
    variances: Tensor
    scatter: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        covariance: Covariance = "full",
        rank: int = 32,
        jitter: float = 1e-4,
    ) -> None:
        super().__init__()
        check_options(covariance, rank, jitter)
        self.num_features, self.num_classes = num_features, num_classes
        self.covariance, self.rank, self.jitter = covariance, min(rank, num_features), jitter
        self._shared_factor: Tensor | None = None
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("means", torch.zeros(num_classes, num_features, dtype=torch.float64))
        if covariance == "shared":
            self.register_buffer("scatter", torch.zeros(num_features, num_features, dtype=torch.float64))
            return
        columns = num_features if covariance == "full" else self.rank
        self.register_buffer("factors", torch.zeros(num_classes, num_features, columns, dtype=torch.float32))
        if covariance == "low_rank":
            self.register_buffer("variances", torch.zeros(num_classes, num_features, dtype=torch.float32))

    @torch.no_grad()
    def gather(self, classes: Sequence[int], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Learn classes from all their samples, those of the other ranks included; each once.

        If anything is refused, none of them is learnt.

        Args:
            classes: to be learnt.
            batches: features (b, n) and classes (b,), this rank's share.

        Raises:
            UserError: if features and classes are no tensors of such shapes, features are not finite or too large to be
                squared, or a class is not in [0, C), not among those to be learnt, or learnt already.
        """
        name = type(self).__name__
        check_classes(name, torch.tensor([*classes], dtype=torch.long), len(classes), self.num_classes)
        known = [label for label in classes if self.counts[label]]
        if known:
            raise UserError(f"{name}: class {known[0]} was gathered already; it is learnt once.")
        places = {label: place for place, label in enumerate(classes)}
        device, n = self.means.device, self.num_features
        counts = torch.zeros(len(classes), dtype=torch.float64, device=device)
        means = torch.zeros(len(classes), n, dtype=torch.float64, device=device)
        scatters = torch.zeros(len(classes), n, n, dtype=torch.float64, device=device)
        for features, targets in batches:
            check_features(name, features, n)
            check_classes(name, targets, len(features), self.num_classes)
            for label in torch.bincount(targets).nonzero().flatten().tolist():
                if label not in places:
                    raise UserError(f"{name}: a sample of class {label} came while {[*places]} were gathered.")
                rows = features[targets == label].to(device, torch.float64)
                place = places[label]
                mean = rows.mean(dim=0)
                centred = rows - mean
                shift = mean - means[place]
                whole = counts[place] + len(rows)
                # squares about the common mean are those about both means, and that of the shift between them
                scatters[place].addmm_(centred.T, centred)
                scatters[place].addr_(shift, shift * (counts[place] * len(rows) / whole))
                means[place] += shift * (len(rows) / whole)
                counts[place] = whole
        totals = sum_over_ranks(counts)
        common = sum_over_ranks(means * counts.unsqueeze(1)) / totals.clamp_min(1).unsqueeze(1)
        kept = []
        for place, label in enumerate(classes):
            shift = means[place] - common[place]
            scatter = scatters[place].addr_(shift, shift * counts[place])
            scatter.copy_(sum_over_ranks(scatter))
            drawn_with = torch.cat([common[place], scatter.diagonal().sqrt()]).float()
            finite = bool(drawn_with.isfinite().all()) and bool(scatter.isfinite().all())
            kept.append(self._kept(scatter, int(totals[place])) if finite else {})
            if not finite or not all(bool(part.isfinite().all()) for part in kept[-1].values()):
                raise UserError(
                    f"The features of class {label} hold NaN or infinite values, or too large ones to be squared; "
                    "check the weights of model.init_args.backbone and the data."
                )
        for label, total, mean, parts in zip(classes, totals, common, kept, strict=True):
            self.counts[label], self.means[label] = total.long(), mean
            for part, value in parts.items():
                if part == "scatter":
                    self.scatter += value
                else:
                    getattr(self, part)[label] = value
        self._shared_factor = None

    def grow(self, num_classes: int) -> None:
        """Make room for more classes.

        Args:
            num_classes: of all, as many as before at least.
        """
        more = num_classes - self.num_classes
        for name, kept in self.named_buffers():
            if name != "scatter":
                setattr(self, name, torch.cat([kept, kept.new_zeros(more, *kept.shape[1:])]))
        self.num_classes = num_classes

    def _kept(self, scatter: Tensor, count: int) -> dict[str, Tensor]:
        """What is kept of a class, by the name of the buffer."""
        if self.covariance == "shared":
            return {"scatter": scatter}
        covariance = scatter / max(count - 1, 1)
        if self.covariance == "full":
            return {"factors": self._cholesky(covariance)}
        directions = principal_directions(covariance, self.rank)
        left_over = (covariance.diagonal() - directions.square().sum(dim=1)).clamp_min(0)
        return {"factors": directions.float(), "variances": (left_over + self.jitter).float()}

    def _cholesky(self, covariance: Tensor) -> Tensor:
        covariance = covariance.clone()
        covariance.diagonal().add_(self.jitter)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            raise UserError(
                f"jitter={self.jitter} is too small for features as large as those of this class: their covariance has "
                "no Cholesky factor; a larger one would do."
            )
        kept: Tensor = factor.float()
        return kept

    @torch.no_grad()
    def draw(self, label: int, samples: int, generator: torch.Generator, mean_scale: float = 1.0) -> Tensor:
        """Features (samples, n), in float32, of a class whose mean is multiplied by `mean_scale`; the generator is one
        of the CPU, so that every device draws the same.

        Raises:
            UserError: if the class was not gathered.
        """
        if not self.counts[label]:
            raise UserError(f"ClassGaussians: class {label} has no samples to draw like; gather it before.")
        mean = (self.means[label] * mean_scale).float()

        def normal(columns: int) -> Tensor:
            return torch.randn(samples, columns, generator=generator).to(mean.device)

        if self.covariance == "low_rank":
            common = normal(self.rank) @ self.factors[label].T
            return mean + common + normal(self.num_features) * self.variances[label].sqrt()
        return mean + normal(self.num_features) @ self._factor_of(label).T

    def _factor_of(self, label: int) -> Tensor:
        if self.covariance == "full":
            return self.factors[label]
        if self._shared_factor is None:
            self._shared_factor = self._cholesky(self._shared_covariance())
        return self._shared_factor

    def _shared_covariance(self) -> Tensor:
        return self.scatter / (self.counts - 1).clamp_min(0).sum().clamp_min(1)

    def covariance_of(self, label: int) -> Tensor:
        """The covariance (n, n) that features of a class are drawn with, in float64."""
        if self.covariance == "low_rank":
            factor = self.factors[label].double()
            return factor @ factor.T + self.variances[label].double().diag()
        factor = self._factor_of(label).double()
        return factor @ factor.T

    def _load_from_state_dict(self, *args: Any) -> None:
        self._shared_factor = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; sums and factors keep their precision, whatever that of the model becomes."""
        self._shared_factor = None
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-any-return, no-untyped-call]


def principal_directions(covariance: Tensor, rank: int) -> Tensor:
    r"""F (n, rank), with :math:`F F^\top` as close to a covariance (n, n) as that rank can be.

    Example:
        >>> principal_directions(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1).abs()
        tensor([[2.],
                [0.]])
    """
    n = len(covariance)
    # torch's eigh fails on covariances of few samples, which have many equal eigenvalues
    values, directions = scipy.linalg.eigh(covariance.cpu().numpy(), subset_by_index=[n - rank, n - 1])
    factor: Tensor = torch.from_numpy(directions * np.sqrt(np.maximum(values, 0)))
    return factor.to(covariance)


def check_options(covariance: str, rank: int, jitter: float) -> None:
    """Refuse options of `ClassGaussians` that cannot be used.

    Raises:
        UserError: says which.
    """
    require("covariance", covariance, one_of=get_args(Covariance))
    require("rank", rank, at_least=1)
    require("jitter", jitter, above=0, below=math.inf)
