"""Weights of a frozen backbone, which checkpoints name by a fingerprint instead of holding them."""

import hashlib
from typing import Any

import torch
from torch import nn

from mh_lightning.errors import UserError

PREFIX = "backbone."


def fingerprint_of_weights(backbone: nn.Module) -> str:
    """Hexadecimal digest of all parameters and buffers, by name, shape and value.

    Example:
        >>> fingerprint_of_weights(nn.Identity())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_in_float32(backbone: nn.Module) -> bool:
    """Whether weights are as they came, and not rounded to a run's precision."""
    return all(value.dtype == torch.float32 for value in backbone.parameters())


def drop_backbone(state: dict[str, Any]) -> None:
    """Leave out the backbone's weights."""
    for name in [name for name in state if name.startswith(PREFIX)]:
        del state[name]


def check_fingerprint(saved: Any, backbone: nn.Module) -> None:
    """See that a backbone has the weights that a checkpoint names.

    Raises:
        UserError: if it does not.
    """
    if saved != fingerprint_of_weights(backbone):
        raise UserError(
            "model.init_args.backbone: its weights are not those that the checkpoint was trained with; give the same "
            "checkpoint_path, or the file that they came from."
        )
