"""Random projections that are drawn from a seed, so that a state holds the seed alone."""

from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError, require


class DrawnProjection(nn.Module):
    """Features times a matrix P from N(0, 1), the same on every machine.

    Args:
        num_features: n.
        num_projections: M, at least 1.
        seed: in [0, 2**32); by default torch's initial seed, which that of a run sets, and that of a state which is
            loaded.
        dtype: of P.

    Attributes:
        matrix: P, (n, M). It is drawn again, not saved.
        seed: of P.

    Raises:
        UserError: if a number is out of range, or a state belongs to another seed than the one that was given.

    Example:
        >>> projection = DrawnProjection(2, 50, seed=0)
        >>> projection(torch.ones(3, 2)).shape, [*projection.state_dict()]
        (torch.Size([3, 50]), ['seed'])
    """

    matrix: Tensor
    seed: Tensor

    def __init__(
        self, num_features: int, num_projections: int, seed: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        require("num_projections", num_projections, at_least=1, whole=True)
        self.given_seed = seed
        self.register_buffer("seed", torch.tensor(seed_of_run(seed)))
        self.register_buffer("matrix", torch.empty(num_features, num_projections, dtype=dtype), persistent=False)
        self._draw(seed_of_run(seed))

    def _draw(self, seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(self.matrix.shape, generator=generator, device="cpu", dtype=torch.float32)
        with torch.inference_mode(mode=False):  # gradients may pass through it later
            self.matrix = drawn.to(self.matrix)

    def forward(self, features: Tensor) -> Tensor:
        """Features (b, n) as (b, M), in P's type."""
        return features.to(self.matrix.dtype) @ self.matrix

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = int(state_dict.get(f"{prefix}seed", self.seed))
        if saved != int(self.seed):
            if self.given_seed is not None:
                raise UserError(f"seed={self.given_seed}: the state was learnt with seed={saved}; give that one.")
            self._draw(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)


def seed_of_run(seed: int | None) -> int:
    """The seed that was given, or torch's initial one, which that of a run sets.

    Raises:
        UserError: if it is not in [0, 2**32).

    Example:
        >>> torch.manual_seed(5) and seed_of_run(None)
        5
    """
    require("seed", seed, at_least=0, below=2**32, whole=True)
    return torch.initial_seed() % 2**32 if seed is None else seed
