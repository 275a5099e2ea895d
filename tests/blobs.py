"""Gaussian classes, for closed-form classifiers."""

import torch
from torch import Tensor

FEATURES, CLASSES = 5, 7


def blobs(
    samples: int, seed: int, offset: float = 0.0, features: int = FEATURES, classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    """Overlapping, unequal classes, each with a sample at least; the same classes for every seed."""
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.arange(1.0, classes + 1), samples, True, generator=generator)
    targets[:classes] = torch.arange(classes)
    return centres[targets] + torch.randn(samples, features, generator=generator) + offset, targets
