"""Automatic mixed precision: what it asks for, and staying out of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that automatic mixed precision computes in on the tensor's device, if it is on."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking for meta is an error
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on the tensor's device keep their types; free where they do anyway."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)
