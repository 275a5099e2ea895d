"""Modules that take the sizes of some of their buffers from the state that they load."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class SizedByState(nn.Module):
    """A module whose buffers grow as it learns, so that a new one has other sizes than a state to load.

    Attributes:
        sized_by_state: names of those buffers.
    """

    sized_by_state: ClassVar[tuple[str, ...]] = ()

    def take_sizes(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Give buffers the sizes that they will be loaded in."""
        for name in self.sized_by_state:
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor):
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.take_sizes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
