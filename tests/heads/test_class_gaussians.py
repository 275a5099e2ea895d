"""Class Gaussians against NumPy's moments of all samples."""

import copy
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.heads import ClassGaussians
from mh_lightning.heads.class_gaussians import Covariance
from tests.blobs import CLASSES, FEATURES, blobs

JITTER = 1e-4
KINDS = get_args(Covariance)
every_kind = pytest.mark.parametrize("kind", KINDS)


def gathered(
    kind: Covariance, x: Tensor, targets: Tensor, size: int = 7, groups: tuple[range, ...] = (range(3), range(3, 7))
) -> ClassGaussians:
    gaussians = ClassGaussians(x.shape[1], CLASSES, kind, rank=2, jitter=JITTER)
    for group in groups:
        mine = (targets >= group[0]) & (targets <= group[-1])
        gaussians.gather(list(group), zip(x[mine].split(size), targets[mine].split(size), strict=True))
    return gaussians


def covariance(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.cov(rows.double().numpy(), rowvar=False)) if len(rows) > 1 else torch.zeros(
        rows.shape[1], rows.shape[1], dtype=torch.float64)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 300), offset=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 100))
def test_moments_of_one_pass(size: int, offset: float, seed: int) -> None:
    x, targets = blobs(200, seed, offset)
    gaussians = gathered("full", x, targets, size)
    for label in range(CLASSES):
        rows = x[targets == label]
        assert gaussians.counts[label] == len(rows)
        torch.testing.assert_close(gaussians.means[label], rows.double().mean(dim=0), rtol=1e-12, atol=1e-10)
        expected = covariance(rows) + JITTER * torch.eye(FEATURES, dtype=torch.float64)
        torch.testing.assert_close(gaussians.covariance_of(label), expected, rtol=1e-5, atol=1e-6)


def test_shared_covariance_is_the_pooled_one() -> None:
    x, targets = blobs(200, 1)
    gaussians = gathered("shared", x, targets)
    rows = [x[targets == label] for label in range(CLASSES)]
    pooled = sum((len(part) - 1) * covariance(part) for part in rows) / sum(len(part) - 1 for part in rows)
    expected = pooled + JITTER * torch.eye(FEATURES, dtype=torch.float64)
    for label in range(CLASSES):
        torch.testing.assert_close(gaussians.covariance_of(label), expected, rtol=1e-5, atol=1e-6)


def test_low_rank_keeps_principal_directions_and_every_variance() -> None:
    x, targets = blobs(300, 1)
    x = x * torch.tensor([5.0, 3.0, 0.5, 0.4, 0.3])  # two directions that stand out
    whole, low = gathered("full", x, targets), gathered("low_rank", x, targets)
    for label in range(CLASSES):
        exact, kept = whole.covariance_of(label), low.covariance_of(label)
        torch.testing.assert_close(kept.diagonal(), exact.diagonal(), rtol=1e-5, atol=1e-6)
        assert (kept - exact).norm() < 0.1 * exact.norm()
    complete = ClassGaussians(FEATURES, CLASSES, "low_rank", rank=99, jitter=JITTER)
    complete.gather(range(CLASSES), [(x, targets)])
    torch.testing.assert_close(complete.covariance_of(6), whole.covariance_of(6), rtol=1e-4, atol=1e-5)


@every_kind
def test_draws_have_the_moments(kind: Covariance) -> None:
    x, targets = blobs(100, 3, offset=2.0)
    gaussians = gathered(kind, x, targets)
    drawn = gaussians.draw(5, 200_000, torch.Generator().manual_seed(0), mean_scale=0.9)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.double().mean(dim=0), 0.9 * gaussians.means[5], rtol=0, atol=0.02)
    torch.testing.assert_close(covariance(drawn), gaussians.covariance_of(5), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("samples", [1, 2, 9])
def test_low_rank_of_few_samples_in_many_dimensions(samples: int) -> None:
    x = torch.randn(samples, 300, generator=torch.Generator().manual_seed(0))
    gaussians = ClassGaussians(300, 1, "low_rank", rank=8, jitter=JITTER)
    gaussians.gather([0], [(x, torch.zeros(samples, dtype=torch.long))])
    expected = covariance(x) + JITTER * torch.eye(300, dtype=torch.float64)
    torch.testing.assert_close(gaussians.covariance_of(0), expected, rtol=1e-4, atol=1e-6)


@every_kind
def test_a_class_of_one_sample_is_its_mean(kind: Covariance) -> None:
    gaussians = ClassGaussians(3, 2, kind, rank=1, jitter=1e-8)
    gaussians.gather([1], [(torch.ones(1, 3), torch.tensor([1]))])
    drawn = gaussians.draw(1, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, torch.ones(5, 3), rtol=0, atol=1e-3)


@every_kind
@pytest.mark.parametrize("change", [lambda one: one.half(), copy.deepcopy, lambda one: one.bfloat16()])
def test_state_keeps_its_precision(kind: Covariance, change: Callable[[ClassGaussians], ClassGaussians]) -> None:
    x, targets = blobs(100, 3)
    gaussians = gathered(kind, x, targets)
    before = {name: value.clone() for name, value in gaussians.state_dict().items()}
    changed = change(gaussians)
    fresh = ClassGaussians(FEATURES, CLASSES, kind, rank=2, jitter=JITTER)
    fresh.covariance_of(0)  # before there is anything to know
    fresh.load_state_dict(changed.state_dict())
    for one in (changed, fresh):
        for name, value in one.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    draws = [one.draw(2, 4, torch.Generator().manual_seed(1)) for one in (changed, fresh)]
    assert torch.equal(*draws)


@every_kind
def test_features_that_are_not_finite_are_named(kind: Covariance) -> None:
    batch = torch.tensor([[1.0, float("inf")], [0.0, 0.0]]), torch.tensor([0, 0])
    with pytest.raises(UserError, match="features of class 0 hold NaN or infinite values"):
        ClassGaussians(2, 1, kind).gather([0], [batch])


@every_kind
def test_classes_are_gathered_once_and_may_become_more(kind: Covariance) -> None:
    x, targets = blobs(100, 3)
    gaussians = gathered(kind, x, targets)
    before = {name: value.clone() for name, value in gaussians.state_dict().items()}
    with pytest.raises(UserError, match="class 0 was gathered already"):
        gaussians.gather(range(CLASSES), [(x, targets)])
    gaussians = ClassGaussians(FEATURES, 3, kind, rank=2, jitter=JITTER)
    for group in (range(3), range(3, CLASSES)):
        mine = torch.isin(targets, torch.tensor(list(group)))
        gaussians.grow(group.stop)
        with pytest.raises(UserError, match=f"class {group[0]} has no samples to draw like"):
            gaussians.draw(group[0], 1, torch.Generator())
        gaussians.gather(group, [(x[mine], targets[mine])])
    for name, value in gaussians.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)


def test_samples_of_other_classes() -> None:
    with pytest.raises(UserError, match=r"a sample of class 1 came while \[0\] were gathered"):
        ClassGaussians(2, 2).gather([0], [(torch.zeros(1, 2), torch.tensor([1]))])


X, Y = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("classes", "features", "targets", "part"),
    [
        ([0, 11], X, 11 * Y, r"classes must lie in 0 to 1 \(C-1, with 2 classes\), got 11"),
        ([-1, 0], X, Y, "classes must lie in 0 to 1 .* got -1"),
        ([0, 1], X, -Y, "classes must lie in 0 to 1 .* got -1"),
        ([0, 1], X, 2 * Y, "classes must lie in 0 to 1 .* got 2"),
        ([0, 1], X, Y.float(), r"classes must be an integer tensor \(4,\), .* got float32"),
        ([0, 1], X, Y.tolist(), r"classes must be an integer tensor \(4,\), .* got list"),
        ([0, 1], X, Y[1:], r"classes must be an integer tensor \(4,\), .* got int64 of shape \(3,\)"),
        ([0, 1], X[:, 1:], Y, r"features must be a floating-point tensor \(b, 3\), got float32 of shape \(4, 2\)"),
        ([0, 1], X.numpy(), Y, r"features must be a floating-point tensor \(b, 3\), got ndarray"),
        ([0, 1], X.long(), Y, r"features must be a floating-point tensor \(b, 3\), got int64"),
    ],
)
def test_what_is_no_batch_is_refused(classes: list[int], features: Tensor, targets: Tensor, part: str) -> None:
    gaussians = ClassGaussians(3, 2)
    with pytest.raises(UserError, match=f"^ClassGaussians: {part}"):
        gaussians.gather(classes, [(X, torch.zeros_like(Y)), (features, targets)])
    assert not any(bool(kept.any()) for kept in gaussians.buffers())


@every_kind
@pytest.mark.parametrize("value", [float("nan"), 1e39, 1e200])
def test_all_classes_are_gathered_or_none(kind: Covariance, value: float) -> None:
    x, targets = blobs(200, 1)
    bad = x.double()
    bad[targets.eq(CLASSES - 1).nonzero()[0], 1] = value
    gaussians, clean = (ClassGaussians(FEATURES, CLASSES, kind, rank=2) for _ in range(2))
    with pytest.raises(UserError, match=f"features of class {CLASSES - 1} hold NaN or infinite values, or too large"):
        gaussians.gather(range(CLASSES), [(bad, targets)])
    for one in (gaussians, clean):
        one.gather(range(CLASSES), [(x, targets)])
    for name, expected in clean.state_dict().items():
        assert torch.equal(gaussians.state_dict()[name], expected), name


def test_a_jitter_that_rounding_hides() -> None:
    x = 1e12 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="jitter=1e-30 is too small for features as large"):
        ClassGaussians(8, 1, jitter=1e-30).gather([0], [(x, torch.zeros(3, dtype=torch.long))])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"covariance": "diagonal"}, "covariance must be one of full, low_rank, shared; got 'diagonal'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"jitter": 0.0}, r"jitter must be above 0 and finite, got 0\.0"),
        ({"jitter": float("inf")}, "jitter must be above 0 and finite, got inf"),
    ],
)
def test_options_out_of_range(options: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match=part):
        ClassGaussians(2, 2, **options)  # type: ignore[arg-type]
