"""What closed-form classifiers share: sums over a stream's samples, solved when predictions are asked for."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.errors import UserError, require
from mh_lightning.functional.units import in_units, unit_of
from mh_lightning.heads.solved import SolvedHead, steady
from mh_lightning.heads.temperature import Probes, best_temperature, left_out
from mh_lightning.sized_by_state import SizedByState

ROWS = 1024  # that are added at once
NO_SPREAD = 1e-28  # mean squares about a mean, beside its own square, that rounding explains
LARGEST = 2.0**50  # in units: the squares of many more would leave float32
LARGEST_IN_FLOAT64 = 2.0**500  # the same of sums in float64


class ClosedFormHead(SizedByState, ABC):
    """A classifier that is solved from sums over the samples, in one pass and without a gradient.

    How the samples are cut into batches does not matter, up to rounding; whether their order does, each head says.
    Small batches wait until `ROWS` samples can be added at once, which costs little more than to add one. The solution
    is kept until the next update. `double()`, `half()` and the like leave a head as it is, since sums must not be
    rounded.

    What cannot be learnt is refused as it comes, by `update`, which leaves the head as it was and keeps what waits.

    Its logits may be of any scale. `probabilities` are the softmax of logits over one temperature, which is chosen on
    some of the samples that were learnt: 128 of the whole stream, or what a head keeps anyway. Regressions answer
    these as if they had not been learnt; other heads answer them as they are, which promises too much where a
    class has few samples.

    Args:
        num_features: n, at least 1.
        num_classes: C, at least 1.

    Attributes:
        counts: samples of each class, (C,), without those that wait.
        answers_with: buffers and modules that `logits` uses beside the solution; None for all. A recorded graph leaves
            out the others.
        probes: the samples that tell the temperature, or None of heads that say `keeps_samples`.
        discriminants: whether only the differences between a sample's logits mean something, and they are up to a
            constant: where the largest of the classes that were seen is beyond ±65,536, it is subtracted from all of
            them, since float32 would lose what tells the classes apart.
        largest: feature that can be summed, in units if the head has any; what is larger is refused.
        unit: of heads that say `in_units`: features are divided by it before all else, so that their squares stay in
            the range of float32. It is 1, unless the largest value of the first sample that is not all zeros is below
            2⁻²⁰ or above 2²⁰: then the power of 2 below that, which divides without rounding. 0 before any. So it hangs
            on which sample comes first, and if that is far larger than all others, these are as good as 0.
    """

    waits: ClassVar[bool] = True
    in_units: ClassVar[bool] = False
    predictions_are_cheap: ClassVar[bool] = False  # next to learning, as where there is nothing to solve
    discriminants: ClassVar[bool] = False
    keeps_samples: ClassVar[bool] = False
    answers_with: ClassVar[tuple[str, ...] | None] = None
    same_on_all_ranks = True  # see `mh_lightning.distributed.state_kept_alike`
    counts: Tensor
    unit: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        require("num_features", num_features, at_least=1, whole=True)
        require("num_classes", num_classes, at_least=1, whole=True)
        self.num_features, self.num_classes = num_features, num_classes
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        self.largest = LARGEST if self.in_units else LARGEST_IN_FLOAT64
        if self.in_units:
            self.register_buffer("unit", torch.zeros((), dtype=torch.float64))
        self.probes = None if self.keeps_samples else Probes(num_features)
        # DistributedDataParallel wants something to train
        self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float32))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows_waiting = 0
        self._solution: tuple[Tensor, ...] | None = None
        self._temperature: float | None = None

    # --- the parts that heads define

    @abstractmethod
    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,) to the sums, before `counts` has them."""

    @abstractmethod
    def solve(self) -> tuple[Tensor, ...]:
        """What `logits` needs, from the sums of one sample at least."""

    @abstractmethod
    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Logits (b, C) of features (b, n); those of classes not seen yet may be any finite numbers."""

    def answers_left_out(self, *solution: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (p, C) of samples that were learnt, as far as possible as if they had not been, and their classes
        (p,). Of a head that knows their `leverage`, they are; of others, they are the logits that it has now.
        """
        features, classes = self.probed()
        answers, leverage = self.logits(features, *solution), self.leverage(*solution)
        if leverage is not None:
            answers = left_out(answers, F.one_hot(classes, self.num_classes).to(answers), leverage)
        return answers, classes

    def leverage(self, *solution: Tensor) -> Tensor | None:
        """How much of its own target the answer to each probe holds, (p,); None where that is not known."""
        return None

    def probed(self) -> tuple[Tensor, Tensor]:
        """Features (p, n) and classes (p,) of the samples that tell the temperature."""
        assert self.probes is not None, "a head that keeps samples says what it answers them"
        return self.probes.kept()

    # --- the frame

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Count features (b, n) of classes (b,).

        Raises:
            UserError: if these are no tensors of such shapes, features are not finite or too large to be summed, or
                classes are not in [0, C); nothing is counted then.
        """
        name = type(self).__name__
        check_features(name, features, self.num_features)
        check_classes(name, targets, len(features), self.num_classes)
        if len(targets) == 0:
            return
        features, unit = features.detach(), self._unit_with(features)
        if unit is not None:
            features = in_units(features, unit)
        largest = float(features.abs().max())
        if not math.isfinite(largest):
            raise UserError(f"{name}: the features hold NaN or infinite values; leave these samples out, or mend them.")
        if largest > self.largest:
            beside = "" if unit is None else f" beside the first ones, which are about {unit:.0e}"
            raise UserError(
                f"{name}: a feature of {largest * (unit or 1):.0e} is too large to be summed{beside}; scale the "
                "features, or leave this sample out."
            )
        if unit is not None:
            self.unit.fill_(unit if bool(self.unit) or bool(features.any()) else 0.0)
        self._solution = self._temperature = None
        self._rows_waiting += len(targets)
        full = not self.waits or self._rows_waiting >= ROWS
        self._waiting.append((features, targets.long()) if full else (features.clone(), targets.long().clone()))
        if full:
            self.settle()

    def _unit_with(self, features: Tensor) -> float | None:
        """The unit, with these features (b, n) the first if there were none but zeros."""
        if not self.in_units:
            return None
        return float(self.unit) or unit_of(features)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def settle(self) -> None:
        """Add the samples that wait."""
        if not self._waiting:
            return
        device = self.counts.device
        waiting = [(features.to(device), targets.to(device)) for features, targets in self._waiting]
        features, targets = waiting[0] if len(waiting) == 1 else map(torch.cat, zip(*waiting, strict=True))
        with torch.autocast(device.type, enabled=False):
            while len(targets):
                self.accumulate(features[:ROWS], targets[:ROWS])
                if self.probes is not None:
                    self.probes.add(features[:ROWS], targets[:ROWS])
                self.counts += torch.bincount(targets[:ROWS], minlength=self.num_classes)
                features, targets = features[ROWS:], targets[ROWS:]
                self._waiting, self._rows_waiting = [(features, targets)], len(targets)  # an error loses none of them
        self._waiting = []

    def grow(self, num_classes: int) -> None:
        """Make room for more classes; what was learnt stays.

        Args:
            num_classes: of all, as many as before at least.

        Raises:
            UserError: if there would be fewer.
        """
        require("num_classes", num_classes, at_least=self.num_classes, whole=True)
        self.settle()
        with torch.device("meta"):
            larger = dict(type(self)(**{**self.options, "num_classes": num_classes}).named_buffers(recurse=False))
        for name, buffer in list(self.named_buffers(recurse=False)):
            missing = [end - now for end, now in zip(larger[name].shape, buffer.shape, strict=True)]
            if any(extra > 0 for extra in missing):
                padding = [side for extra in reversed(missing) for side in (0, extra)]
                setattr(self, name, F.pad(buffer, padding))
        self.num_classes = num_classes
        self._solution = self._temperature = None

    def ensure_solved(self) -> None:
        """Solve, if there are samples that the solution does not know; `forward` does it otherwise."""
        self.settle()
        if self._solution is None and bool(self.counts.any()):
            self._solution = self._solved()

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, C) of features (b, n); classes not seen yet get half the lowest finite value. Those of heads with
        `discriminants` are up to a constant for each sample.

        Raises:
            UserError: if there are no features of this shape.
        """
        check_features(type(self).__name__, features, self.num_features)
        self.ensure_solved()
        dtype = torch.promote_types(features.dtype, torch.float32)
        lowest = torch.finfo(dtype).min / 2
        if self._solution is None:
            return torch.full((len(features), self.num_classes), lowest, dtype=dtype, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            unit = float(self.unit) if self.in_units else 0.0
            logits = self.logits(in_units(features, unit) if unit else features, *self._solution)
        unseen = self.counts == 0
        if self.discriminants:
            logits = steady(logits, unseen)
        return logits.to(dtype).masked_fill(unseen, lowest)

    @property
    def temperature(self) -> float:
        """What logits are divided by, above 0; 1 before any sample."""
        self.ensure_solved()
        if self._temperature is None and self._solution is not None:
            self._temperature = self._best_temperature(self._solution)
        return self._temperature or 1.0

    def calibrated(self, features: Tensor) -> Tensor:
        """Logits (b, C) of features (b, n) divided by the temperature: their softmax is what can be believed."""
        logits: Tensor = self(features)
        return (logits / self.temperature).clamp_min(torch.finfo(logits.dtype).min / 2)

    def probabilities(self, features: Tensor) -> Tensor:
        """Of the classes, (b, C), for features (b, n); 0 of classes not seen yet.

        Raises:
            UserError: if there are no features of this shape.
        """
        return torch.softmax(self.calibrated(features), dim=1)

    def solved(self) -> SolvedHead:
        """Its answers as they are now, for a recorded graph."""
        self.ensure_solved()
        return SolvedHead(self)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _best_temperature(self, solution: tuple[Tensor, ...]) -> float:
        with torch.autocast(self.counts.device.type, enabled=False):
            answers, classes = self.answers_left_out(*solution)
        seen = self.counts > 0
        return best_temperature(answers[:, seen], (seen.cumsum(dim=0) - 1)[classes])

    @torch.inference_mode(mode=False)  # a solution that evaluation has found serves a gradient, too
    @torch.no_grad()
    def _solved(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.counts.device.type, enabled=False):
            return self.solve()

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(saved)
        self._waiting, self._rows_waiting, self._solution, self._temperature = [], 0, None, None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def options(self) -> dict[str, Any]:
        """Plain arguments that the head was made with and that are attributes by the same names, on which its sums
        hang; all but a seed, which is part of the state.
        """
        found = {name: getattr(self, name, None) for name in signature(type(self)).parameters if name != "seed"}
        return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str | tuple)}

    def get_extra_state(self) -> Tensor:
        """The options, as the bytes of JSON."""
        return torch.tensor(list(json.dumps(self.options).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state of other options.

        Raises:
            UserError: names the first that differs.
        """
        saved, own = json.loads(bytes(state.tolist())), json.loads(json.dumps(self.options))
        for name, value in own.items():
            if saved.get(name, value) != value:
                raise UserError(
                    f"{type(self).__name__}: {name} is {value!r}, but the state was learnt with {saved[name]!r}; make "
                    "the head with the same options."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the sums keep their precision, whatever that of the model becomes."""
        self._solution = self._temperature = None
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-any-return, no-untyped-call]


def check_features(name: str, features: Any, num_features: int) -> None:
    """Refuse what is no floating-point tensor (b, n).

    Raises:
        UserError: with the name in front.

    Example:
        >>> check_features("ClassMeans", [[1.0]], 1)
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: ClassMeans: features must be a floating-point tensor (b, 1), got list.
    """
    fits = isinstance(features, Tensor) and features.is_floating_point()
    if not fits or features.ndim != 2 or features.shape[1] != num_features:
        raise UserError(f"{name}: features must be a floating-point tensor (b, {num_features}), got {_kind(features)}.")


def check_classes(name: str, targets: Any, samples: int, num_classes: int) -> None:
    """Refuse what is no integer tensor (samples,) of numbers from 0 to C-1.

    Raises:
        UserError: with the name in front.

    Example:
        >>> check_classes("ClassMeans", torch.tensor([0, 11]), 2, 10)
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: ClassMeans: classes must lie in 0 to 9 (C-1, with 10 classes), got 11.
    """
    fits = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())
    if not fits or targets.dtype == torch.bool or targets.shape != (samples,):
        raise UserError(
            f"{name}: classes must be an integer tensor ({samples},), one for each sample, got {_kind(targets)}."
        )
    wrong = targets[(targets < 0) | (targets >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{name}: classes must lie in 0 to {num_classes - 1} (C-1, with {num_classes} classes), got "
            f"{int(wrong[0])}."
        )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
