"""What closed-form classifiers share: sums over a stream's samples, solved when predictions are asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

ROWS = 1024  # that are added at once


class ClosedFormHead(nn.Module, ABC):
    """A classifier that is solved from sums over the samples, in one pass and without a gradient.

    Neither the order nor the size of batches matters, up to rounding. Small batches wait until `ROWS` samples can be
    added at once, which costs little more than to add one. The solution is kept until the next update. `double()`,
    `half()` and the like leave a head as it is, since sums must not be rounded.

    Args:
        num_features: n.
        num_classes: C.

    Attributes:
        counts: samples of each class, (C,), without those that wait.
    """

    waits: ClassVar[bool] = True
    same_on_all_ranks = True  # see `mh_lightning.distributed.state_kept_alike`
    counts: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        # DistributedDataParallel wants something to train
        self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float32))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows_waiting = 0
        self._solution: tuple[Tensor, ...] | None = None

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

    # --- the frame

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Count features (b, n) of classes (b,)."""
        self._solution = None
        self._rows_waiting += len(targets)
        full = not self.waits or self._rows_waiting >= ROWS
        self._waiting.append((features, targets) if full else (features.detach().clone(), targets.clone()))
        if full:
            self.settle()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def settle(self) -> None:
        """Add the samples that wait."""
        if not self._waiting:
            return
        waiting, self._waiting, self._rows_waiting = self._waiting, [], 0
        device = self.counts.device
        features, targets = waiting[0] if len(waiting) == 1 else map(torch.cat, zip(*waiting, strict=True))
        features, targets = features.to(device), targets.to(device)
        with torch.autocast(device.type, enabled=False):
            for rows, classes in zip(*(torch.split(part, ROWS) for part in (features, targets)), strict=True):
                self.accumulate(rows, classes)
                self.counts += torch.bincount(classes, minlength=self.num_classes)

    def ensure_solved(self) -> None:
        """Solve, if there are samples that the solution does not know; `forward` does it otherwise."""
        self.settle()
        if self._solution is None and bool(self.counts.any()):
            self._solution = self._solved()

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, C); classes not seen yet get half the lowest finite value."""
        self.ensure_solved()
        dtype = torch.promote_types(features.dtype, torch.float32)
        lowest = torch.finfo(dtype).min / 2
        if self._solution is None:
            return torch.full((len(features), self.num_classes), lowest, dtype=dtype, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.logits(features, *self._solution)
        return logits.to(dtype).masked_fill(self.counts == 0, lowest)

    @torch.inference_mode(mode=False)  # a solution that evaluation has found serves a gradient, too
    @torch.no_grad()
    def _solved(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.counts.device.type, enabled=False):
            return self.solve()

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._waiting, self._rows_waiting, self._solution = [], 0, None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the sums keep their precision, whatever that of the model becomes."""
        self._solution = None
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-any-return, no-untyped-call]
