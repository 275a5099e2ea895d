"""Losses, from logits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    r"""Cross-entropy :math:`-\log \mathrm{softmax}(o)_y`.

    Args:
        logits: (b, C).
        targets: classes, (b,).
        reduction: "none" or "mean".

    Returns:
        (b,), or their mean.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    return F.cross_entropy(logits, targets, reduction=reduction)


def hinge(logits: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    r"""Multi-class hinge :math:`\sum_c \max(0, -t_c o_c)`, with :math:`t_c = 1` for the sample's class, else -1.

    It has no margin, as in the code published with Tiezzi et al., CoLLAs 2024.

    Args:
        logits: (b, C).
        targets: classes, (b,).
        reduction: "none" or "mean".

    Returns:
        (b,), or their mean.

    Example:
        >>> hinge(torch.tensor([[-2.0, 3.0, -1.0]]), torch.tensor([0]))
        tensor([5.])
    """
    signs = torch.full_like(logits, -1.0).scatter(1, targets.unsqueeze(1), 1.0)
    losses = (-signs * logits).clamp_min(0).sum(dim=1)
    return losses.mean() if reduction == "mean" else losses


LOSSES = {"cross_entropy": cross_entropy, "hinge": hinge}
