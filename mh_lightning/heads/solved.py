"""What a head in closed form answers, fixed."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError
from mh_lightning.functional.units import in_units

STEADY = 2.0**16  # logits beyond it would keep less than two digits behind the point in float32


class SolvedHead(nn.Module):
    """What a closed-form head answers, without what it learns with: calibrated logits (b, C) of features (b, n).

    Args:
        head: a `mh_lightning.heads.ClosedFormHead` that has seen a sample at least.

    Raises:
        UserError: if it has not.
    """

    unseen: Tensor

    def __init__(self, head: Any) -> None:
        super().__init__()
        solution = head._solution
        if solution is None:
            raise UserError(f"{type(head).__name__} has learnt no sample yet, so there is nothing to answer by.")
        self.temperature, self.head = head.temperature, copy.copy(head)
        if head.answers_with is not None:
            for kind in ("_buffers", "_modules"):
                parts = {name: part for name, part in getattr(head, kind).items() if name in head.answers_with}
                setattr(self.head, kind, parts)
        self.unit = float(head.unit) if head.in_units else 0.0
        self.register_buffer("unseen", head.counts == 0)
        for place, part in enumerate(solution):
            self.register_buffer(f"solution_{place}", part)
        self._parts = len(solution)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, half the lowest finite value for classes not seen yet."""
        solution = [getattr(self, f"solution_{place}") for place in range(self._parts)]
        logits: Tensor = self.head.logits(in_units(features, self.unit) if self.unit else features, *solution)
        if self.head.discriminants:
            logits = steady(logits, self.unseen)
        dtype = torch.promote_types(features.dtype, torch.float32)
        lowest = torch.finfo(dtype).min / 2
        calibrated: Tensor = (logits / self.temperature).to(dtype)
        return calibrated.clamp_min(lowest).masked_fill(self.unseen, lowest)


def steady(logits: Tensor, unseen: Tensor) -> Tensor:
    """Logits (b, C) minus that of the best class that was seen, where this is so far from 0 that float32 would lose
    what tells the classes apart.
    """
    best = logits.masked_fill(unseen, -torch.inf).amax(dim=1, keepdim=True)
    return logits - best.where(best.isfinite() & (best.abs() > STEADY), 0.0)
