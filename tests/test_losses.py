"""Losses, against hand-worked values."""

import math

import torch
from torch.nn import functional as F

from mh_lightning.losses import among_classes, cross_entropy, hinge


def test_hinge_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-2.0, 3.0, 1.0]], requires_grad=True)
    losses = hinge(logits, torch.tensor([0, 0]))
    assert losses.tolist() == [0.5, 6.0]  # the class itself only costs below 0, the others only above
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [[0.0, 0.0, 1.0], [-1.0, 1.0, 1.0]]


def test_cross_entropy_is_of_each_sample() -> None:
    logits, targets = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]), torch.tensor([1, 0])
    torch.testing.assert_close(cross_entropy(logits, targets), torch.tensor([math.log(4 / 3), math.log(2.0)]))
    torch.testing.assert_close(cross_entropy(logits, targets).mean(), F.cross_entropy(logits, targets))


def test_other_classes_are_neither_seen_nor_moved() -> None:
    logits = torch.tensor([[1.0, 9.0, 2.0, -3.0], [0.5, -1.0, 2.5, 7.0]], requires_grad=True)
    targets = torch.tensor([2, 0])
    for loss in (cross_entropy, hinge):
        seen = loss(among_classes(logits, torch.tensor([2, 0])), targets)
        alone = loss(logits[:, [0, 2]], torch.tensor([1, 0]))
        torch.testing.assert_close(seen, alone)
        (gradient,) = torch.autograd.grad(seen.sum(), logits)
        assert not gradient[:, [1, 3]].any() and gradient.isfinite().all()
