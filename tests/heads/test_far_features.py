"""Features that are far from zero, or from each other, and samples that would ruin what was learnt."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    KernelMemoryUnits,
    RandomFeatureDiscriminant,
    RandomFeatureRidge,
    RandomProjectionRidge,
    RegularisedDiscriminant,
    RidgeRegression,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
    TruncatedProjection,
)
from mh_lightning.heads.solved import STEADY

FEATURES, CLASSES = 8, 5
kernel = partial(KernelMemoryUnits, FEATURES, CLASSES, 40, 20_000, seed=0)
HEADS: dict[str, Callable[[], ClosedFormHead]] = {
    "means": lambda: ClassMeans(FEATURES, CLASSES),
    "discriminant": lambda: StreamingLinearDiscriminant(FEATURES, CLASSES),
    "covariances": lambda: ShrunkClassCovariances(FEATURES, CLASSES),
    "projections": lambda: RandomProjectionRidge(FEATURES, CLASSES, 50, seed=0),
    "one ridge": lambda: RidgeRegression(FEATURES, CLASSES),
    "kernel": kernel,
    "kernel, l2": partial(kernel, normalization="l2"),
    "kernel, none": partial(kernel, normalization="none"),
    "features": lambda: RandomFeatureRidge(FEATURES, CLASSES, 50, seed=0),
    "features, none": lambda: RandomFeatureRidge(FEATURES, CLASSES, 50, normalization="none", seed=0),
    "kernel discriminant": lambda: RandomFeatureDiscriminant(FEATURES, CLASSES, 50, seed=0),
    "regularised": lambda: RegularisedDiscriminant(FEATURES, CLASSES),
    "truncated": lambda: TruncatedProjection(FEATURES, CLASSES, 50, 20, seed=0),
}


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


# --- what would ruin a head


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("value", [3e38, 1e39, 1e151, 1e200, 1e308])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_feature_too_large_to_be_summed_is_refused_as_it_comes(
    make: Callable[[], ClosedFormHead], value: float, waiting: bool
) -> None:
    x, targets = samples()
    head, clean = make(), make()
    for one in (head, clean):
        one.update(x, targets)
        if not waiting:
            one.settle()
    bad = torch.full((1, FEATURES), value, dtype=torch.float32 if value < 1e39 else torch.float64)
    for sign in (1, -1):
        try:
            head.update(sign * bad, targets[:1])
        except UserError as error:
            assert "too large to be summed" in str(error) and "leave this sample out" in str(error)
        else:
            assert isinstance(head, StreamingLinearDiscriminant) and value < 1e151  # its sums are in float64
            clean.update(sign * bad, targets[:1])
    assert torch.equal(head(x), clean(x)) and bool(head(x).isfinite().all())


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_the_largest_feature_that_is_taken_leaves_answers(make: Callable[[], ClosedFormHead]) -> None:
    x, targets = samples()
    head = make()
    head.update(x, targets)
    for sign in (1, -1):
        head.update(torch.full((1, FEATURES), sign * head.largest, dtype=torch.float64), targets[:1])
    assert bool(head(x).isfinite().all())
    with pytest.raises(UserError, match="too large to be summed"):
        head.update(torch.full((1, FEATURES), 1.01 * head.largest, dtype=torch.float64), targets[:1])


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_no_samples_have_no_logits(make: Callable[[], ClosedFormHead]) -> None:
    head = make()
    assert head(torch.zeros(0, FEATURES)).shape == (0, CLASSES)
    head.update(*samples())
    assert head(torch.zeros(0, FEATURES)).shape == (0, CLASSES)
