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


def among_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits (b, C) with those of all other classes at minus infinity, so that a loss neither sees nor moves them.

    Args:
        logits: (b, C).
        classes: indices, (k,), repeated ones included.

    Example:
        >>> among_classes(torch.zeros(1, 3), torch.tensor([0, 2, 2]))
        tensor([[0., -inf, 0.]])
    """
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[classes] = False
    return logits.masked_fill(others, -torch.inf)


LOSSES = {"cross_entropy": cross_entropy, "hinge": hinge}
