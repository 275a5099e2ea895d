"""Features that are far from zero, or from each other, and samples that would ruin what was learnt."""

import pytest
import torch
from torch import Tensor

from mh_lightning.layers import ClassMeans, ClosedFormHead, RandomProjectionRidge, StreamingLinearDiscriminant
from mh_lightning.layers.closed_form import STEADY

FEATURES, CLASSES = 8, 5


def samples(far: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features of classes that are easily told apart, one of them so far from the others, and the classes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    means[-1] += far
    targets = torch.randint(CLASSES, (600,), generator=generator)
    return means[targets] + 0.5 * torch.randn(600, FEATURES, generator=generator), targets


def accuracy(head: ClosedFormHead, x: Tensor, targets: Tensor) -> float:
    return float((head(x).argmax(dim=1) == targets).double().mean())


# --- logits


def test_a_far_class_leaves_a_discriminant_the_others() -> None:
    x, targets = samples(far=1e5)
    head = StreamingLinearDiscriminant(FEATURES, CLASSES)
    head.update(x, targets)
    assert accuracy(head, x, targets) > 0.95
    torch.testing.assert_close(head(x).double(), head(x.double()), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("kind", [ClassMeans, StreamingLinearDiscriminant])
def test_logits_beyond_float32_are_less_by_the_largest_of_the_classes_seen(kind: type[ClosedFormHead]) -> None:
    x, targets = samples()
    head = kind(FEATURES, CLASSES)
    head.update(x[targets != 2], targets[targets != 2])
    directions = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(1))
    far = 1e8 * directions / directions.norm(dim=1, keepdim=True)
    logits, exact = head(far), head.logits(far, *head.solve())
    exact[:, 2] = -torch.inf
    assert bool((exact.amax(dim=1).abs() > STEADY).all()) and torch.equal(logits.argmax(dim=1), exact.argmax(dim=1))
    expected = exact - exact.amax(dim=1, keepdim=True)
    expected[:, 2] = torch.finfo(torch.float32).min / 2
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=0)
    near = head.logits(x, *head.solve()).float()  # which are as they were
    near[:, 2] = torch.finfo(torch.float32).min / 2
    assert torch.equal(head(x), near)


# --- sums


@pytest.mark.parametrize("place", [0, 300, 600])
def test_a_row_of_zeros_before_an_offset_costs_nothing_wherever_it_comes(place: int) -> None:
    x, targets = samples()
    x += 1e4
    rows = torch.cat([x[:place], torch.zeros(1, FEATURES), x[place:]])
    head = RandomProjectionRidge(FEATURES, CLASSES, 200, seed=0)
    head.update(rows, torch.cat([targets[:place], targets[:1], targets[place:]]))
    assert accuracy(head, x, targets) > 0.95


@pytest.mark.parametrize("far", [1e3, 1e4, 1e6])
def test_a_far_class_leaves_random_projections_the_others(far: float) -> None:
    x, targets = samples(far)
    head = RandomProjectionRidge(FEATURES, CLASSES, 200, seed=0)
    head.update(x, targets)
    assert accuracy(head, x, targets) > 0.95
