"""What holds for every closed-form head."""

import copy
import math
import pickle
import random
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    JointKernelRidge,
    JointLogisticRegression,
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
from mh_lightning.heads.base import ROWS
from tests.blobs import CLASSES, FEATURES, blobs
from tests.heads.test_class_covariances import direct

Make = Callable[[], ClosedFormHead]
AS_THEY_ARE: dict[str, Make] = {  # features are not normalised
    "means": lambda: ClassMeans(FEATURES, CLASSES),
    "discriminant": lambda: StreamingLinearDiscriminant(FEATURES, CLASSES),
    "covariances": lambda: ShrunkClassCovariances(FEATURES, CLASSES),
    "ridge": lambda: RandomProjectionRidge(FEATURES, CLASSES, num_projections=20),
}
HEADS: dict[str, Make] = AS_THEY_ARE | {
    "features": lambda: RandomFeatureRidge(FEATURES, CLASSES, num_projections=20, seed=0),
    "kernel": lambda: KernelMemoryUnits(FEATURES, CLASSES, key_mem_units=20, max_bytes=1000, seed=0),
    "joint": lambda: JointKernelRidge(FEATURES, CLASSES, seed=0),
}
ORDERED = RandomProjectionRidge, KernelMemoryUnits, JointKernelRidge  # the order decides which samples do what
EVERY: dict[str, Make] = HEADS | {
    "one ridge": lambda: RidgeRegression(FEATURES, CLASSES),
    "kernel discriminant": lambda: RandomFeatureDiscriminant(FEATURES, CLASSES, num_projections=20, seed=0),
    "regularised": lambda: RegularisedDiscriminant(FEATURES, CLASSES),
    "truncated": lambda: TruncatedProjection(FEATURES, CLASSES, num_projections=20, rank=20, seed=0),
    "logistic": lambda: JointLogisticRegression(FEATURES, CLASSES, seed=0),
}
X, Y = blobs(8, 3)
NAN = X.index_fill(0, torch.tensor([5]), float("nan"))
REFUSED: dict[str, tuple[object, object, str]] = {
    "nan": (NAN, Y, "features hold NaN or infinite values"),
    "infinite": (X / 0, Y, "features hold NaN or infinite values"),
    "class too large": (X, Y + 11 - Y.max(), r"classes must lie in 0 to 6 \(C-1, with 7 classes\), got"),
    "class too small": (X, -1 - Y, r"classes must lie in 0 to 6 .* got -1"),
    "width": (X[:, 1:], Y, r"features must be a floating-point tensor \(b, 5\), got float32 of shape \(8, 4\)"),
    "one sample": (X[0], Y[:1], r"got float32 of shape \(5,\)"),
    "numpy": (X.numpy(), Y, r"features must be a floating-point tensor \(b, 5\), got ndarray"),
    "integers": (X.long(), Y, r"floating-point tensor \(b, 5\), got int64"),
    "list of classes": (X, Y.tolist(), r"classes must be an integer tensor \(8,\), one for each sample, got list"),
    "float classes": (X, Y.float(), r"integer tensor \(8,\), .* got float32 of shape \(8,\)"),
    "one-hot": (X, F.one_hot(Y, CLASSES), r"integer tensor \(8,\), .* got int64 of shape \(8, 7\)"),
    "too few classes": (X, Y[1:], r"integer tensor \(8,\), .* got int64 of shape \(7,\)"),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


@every_head
@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 60), shuffler=st.randoms(use_true_random=False))
def test_batches_of_any_size_and_order(make: Make, size: int, shuffler: random.Random) -> None:
    x, targets = blobs(60, 1)
    queries = blobs(50, 2)[0]
    whole, parts = make(), make()
    whole.update(x, targets)
    batches = list(zip(x.split(size), targets.split(size), strict=True))
    if not isinstance(whole, ORDERED):
        shuffler.shuffle(batches)
    for batch in batches:
        parts.update(*batch)
        if shuffler.random() < 0.2:
            parts.settle()
    states = [
        {name: value for name, value in head.state_dict().items() if isinstance(whole, ORDERED) or "probes" not in name}
        for head in (parts, whole)  # the order decides which samples tell the temperature
    ]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts(queries), whole(queries), rtol=1e-4, atol=1e-4)


@every_head
def test_only_small_batches_wait(make: Make) -> None:
    head = make()
    x, targets = blobs(ROWS + 10, 1)
    for rows in (x[:-11], x[-11:-10]):  # 1023, and one more
        head.update(rows, targets[: len(rows)])
    assert head.counts.sum() == ROWS
    head.update(x[:5], targets[:5])
    assert head.counts.sum() == ROWS + (0 if head.waits else 5)
    assert head.state_dict()["counts"].sum() == head.counts.sum() == ROWS + 5


@every_head
def test_what_waits_is_a_copy(make: Make) -> None:
    x, targets = blobs(20, 1)
    expected, head = make(), make()
    expected.update(x.clone(), targets.clone())
    head.update(x, targets)
    x += 1
    targets += 1
    torch.testing.assert_close(head(x), expected(x), rtol=0, atol=0)


@every_head
def test_state_goes_on_elsewhere(make: Make) -> None:
    x, targets = blobs(100, 1)
    head = make()
    head.update(x[:50], targets[:50])
    copied, pickled, loaded = copy.deepcopy(head), pickle.loads(pickle.dumps(head)), make()
    loaded.update(x[50:], targets[50:])  # which the state replaces
    loaded.load_state_dict(head.state_dict())
    for one in (head, copied, pickled, loaded):
        one.update(x[50:], targets[50:])
    logits = head(x)
    for other in (copied, pickled, loaded):
        torch.testing.assert_close(other(x), logits, rtol=1e-5, atol=1e-5)


@every_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unseen_classes_are_never_predicted(make: Make, dtype: torch.dtype) -> None:
    x, targets = blobs(200, 1)
    seen = targets % 2 == 1
    head = make()
    assert head(x.to(dtype)).isfinite().all()  # before any class was seen
    head.update(x[seen].to(dtype), targets[seen])
    logits = head(10 * blobs(300, 2)[0].to(dtype))
    assert logits.isfinite().all() and logits.dtype == torch.promote_types(dtype, torch.float32)
    assert (logits[:, 0::2] < logits[:, 1::2].min()).all()


@every_head
def test_one_sample_is_enough(make: Make) -> None:
    head = make()
    head.update(torch.ones(1, FEATURES), torch.tensor([3]))
    assert head(torch.randn(4, FEATURES)).argmax(dim=1).tolist() == [3] * 4


@every_head
def test_solves_once_for_each_update(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    head, solved = make(), []
    monkeypatch.setattr(head, "solve", lambda: (solved.append(1), type(head).solve(head))[1])
    x, targets = blobs(60, 1)
    for updates in (1, 2):
        head.update(x, targets)
        for _ in range(3):
            head(x)
        assert len(solved) == updates
    head.double()
    head(x)
    assert len(solved) == 3


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_and_autocast_leave_no_trace(make: Make, dtype: torch.dtype) -> None:
    x, targets = blobs(60, 1)
    x = x.to(dtype)
    plain, rounded = make().half(), make().to(dtype)
    plain.update(x[:10], targets[:10])
    plain.bfloat16()
    plain.update(x[10:], targets[10:])
    with torch.autocast("cpu", torch.bfloat16):
        rounded.update(x, targets)
        with torch.inference_mode():
            torch.testing.assert_close(rounded(x), plain(x), rtol=0, atol=0)
    queries = x.clone().requires_grad_()
    rounded(queries)[:, targets].sum().backward()  # though it was solved in inference mode
    assert queries.grad is not None and queries.grad.isfinite().all()
    before = copy.deepcopy(plain.state_dict())
    plain.update(x[:0], targets[:0])
    plain(x)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_what_is_refused_leaves_no_trace(make: Make) -> None:
    torch.manual_seed(0)  # of the projections
    head, clean = make(), make()
    x, targets = blobs(1500, 1)
    for one in (head, clean):
        one.update(x[:700], targets[:700])
        waiting = one._rows_waiting
    for features, classes, sentence in REFUSED.values():
        with pytest.raises(UserError, match=f"^{type(head).__name__}: .*{sentence}"):
            head.update(features, classes)  # type: ignore[arg-type]
        assert head._rows_waiting == waiting
    with pytest.raises(UserError, match="features must be"):
        head(X.numpy())
    for one in (head, clean):
        one.update(x[700:], targets[700:].int())
    for name, value in clean.state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name
    assert head.counts.sum() == 1500 and torch.equal(head(x), clean(x))


@every_head
def test_an_error_inside_loses_no_sample(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, clean = make(), make()
    x, targets = blobs(2 * ROWS + 9, 1)
    accumulate = head.accumulate

    def fails_at_first(features: Tensor, classes: Tensor) -> None:
        if head.counts.sum() == ROWS:
            monkeypatch.undo()
            raise KeyboardInterrupt
        accumulate(features, classes)

    monkeypatch.setattr(head, "accumulate", fails_at_first)
    with pytest.raises(KeyboardInterrupt):
        head.update(x, targets)
    assert head.counts.sum() == ROWS
    clean.update(x, targets)
    for name, value in clean.state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name


def exact(head: ClosedFormHead, x: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
    """Logits in float64, not in units, by other packages or step by step."""
    x, queries = x.double(), queries.double()
    match head:
        case ClassMeans():
            means = torch.stack([x[targets == label].mean(dim=0) for label in range(CLASSES)])
            return -(queries.unsqueeze(1) - means).square().sum(dim=2)
        case StreamingLinearDiscriminant():
            classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=head.shrinkage)
            classifier.fit(x.numpy(), targets.numpy())
            return torch.from_numpy(classifier.decision_function(queries.numpy()) - np.log(classifier.priors_))
        case ShrunkClassCovariances():
            arrays = (x.numpy(), targets.numpy(), queries.numpy())
            return torch.from_numpy(-direct(*arrays, head.tukey, (1.0, 1.0), False))
        case RandomProjectionRidge():
            projection = head.projection.matrix.double()
            ridge = Ridge(alpha=float(head.ridge), fit_intercept=False, solver="svd")
            hidden, asked = (torch.relu(rows / head.unit @ projection).numpy() for rows in (x, queries))
            ridge.fit(hidden, F.one_hot(targets, CLASSES).double().numpy())
            return torch.from_numpy(ridge.predict(asked))
    raise AssertionError


@pytest.mark.parametrize("make", AS_THEY_ARE.values(), ids=AS_THEY_ARE)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e4), (1e-20, 0.0), (1e20, 0.0), (1e-20, 1e-16)], ids=str)
def test_neither_an_offset_nor_a_scale_costs_digits(make: Make, scale: float, offset: float) -> None:
    torch.manual_seed(0)
    head = make()
    (x, targets), (queries, _) = ((scale * rows + offset, classes) for rows, classes in (blobs(700, 1), blobs(99, 2)))
    for batch in zip(x.split(64), targets.split(64), strict=True):
        head.update(*batch)
        head.settle()
    found = head(queries).double()
    expected = exact(head, x, targets, queries)
    if isinstance(head, ClassMeans | ShrunkClassCovariances):
        power = 2 * getattr(head, "tukey", 1.0)
        expected /= head.unit**power
        assert head.unit == (1 if scale == 1 else 2.0 ** math.floor(math.log2(x[0].abs().max())))
    if isinstance(head, StreamingLinearDiscriminant):
        found, expected = found - found[:, :1], expected - expected[:, :1]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@every_head
def test_the_first_sample_that_is_not_zero_gives_the_unit(make: Make) -> None:
    head = make()
    if not head.in_units:
        return
    x, targets = blobs(20, 1)
    x *= 1e-20
    x[:3] = 0
    head.update(x[:2], targets[:2])
    assert head.unit == 0
    head.update(x[2:], targets[2:])
    assert head.unit == 2.0 ** math.floor(math.log2(x[3].abs().max()))
    with pytest.raises(UserError, match=r"a feature of 1e\+00 is too large .* beside the first ones, .* [0-9]e-2[01]"):
        head.update(torch.ones(1, FEATURES), targets[:1])
    assert head.state_dict()["counts"].sum() == 20


@pytest.mark.parametrize("offset", [1e3, 1e6, 1e8])
def test_a_discriminant_of_a_far_offset_still_knows_the_spread(offset: float) -> None:
    near, far = StreamingLinearDiscriminant(FEATURES, CLASSES), StreamingLinearDiscriminant(FEATURES, CLASSES)
    x, targets = blobs(300, 1)
    x = (64 * x.double()).round() / 64  # which an offset does not round
    for batch in zip(x.split(50), targets.split(50), strict=True):
        near.update(*batch)
        far.update(batch[0] + offset, batch[1])
    torch.testing.assert_close(far(x + offset), near(x), rtol=1e-4, atol=1e-4)


def test_equal_samples_that_rounding_parts_have_no_spread() -> None:
    head, discriminant = ShrunkClassCovariances(2, 2, tukey=1.0), StreamingLinearDiscriminant(2, 2)
    for one in (head, discriminant):
        for _ in range(3):
            one.update(torch.tensor([[0.1, 0.7]] * 3 + [[0.3, 0.9]] * 3).double(), torch.tensor([0, 0, 0, 1, 1, 1]))
            one.settle()
    queries = torch.tensor([[0.3, 0.3]]).double()
    torch.testing.assert_close(head(queries), torch.tensor([[-0.2, -0.36]]).double(), rtol=1e-6, atol=0)
    assert discriminant(queries).argmax() == 0


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_every_head_is_tried_without_memory(make: Make) -> None:
    with torch.device("meta"):  # as methods try them, before any data are read
        assert make().counts.device.type == "meta"


@pytest.mark.parametrize(
    ("head", "others"),
    [
        (KernelMemoryUnits, {"normalization": "l2", "width": 2.0, "key_mem_units": 7, "max_bytes": 20_000}),
        (RandomFeatureRidge, {"normalization": "l2", "width": 2.0, "kind": "fourier", "num_projections": 60}),
        (RandomFeatureDiscriminant, {"normalization": "l2", "shrinkage": 0.5, "kind": "relu"}),
        (RegularisedDiscriminant, {"rank": 2, "alphas": (0.2, 0.8, 0.01), "normalization": "none"}),
        (RidgeRegression, {"normalization": "l2", "num_classes": 9, "num_features": 9}),
        (TruncatedProjection, {"rank": 2, "normalization": "none"}),
        (ShrunkClassCovariances, {"tukey": 1.0}),
        (StreamingLinearDiscriminant, {"shrinkage": 0.5}),
        (RandomProjectionRidge, {"num_projections": 60}),
    ],
)
def test_a_state_of_other_options_is_refused(head: type[ClosedFormHead], others: dict[str, Any]) -> None:
    few = {"num_projections": 50} if "num_projections" in signature(head).parameters else {}
    usual = {"num_features": FEATURES, "num_classes": CLASSES, **few}
    learnt = head(**usual)
    learnt.update(torch.rand(20, FEATURES), torch.arange(20) % CLASSES)
    state = learnt.state_dict()
    for name, value in others.items():
        other = head(**{**usual, name: value})
        with pytest.raises(UserError, match=f"{head.__name__}: {name} is .* the state was learnt with"):
            other.load_state_dict(state)
    again = head(**usual)
    again.load_state_dict(state)
    queries = torch.rand(5, FEATURES)
    torch.testing.assert_close(again(queries), learnt(queries))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassMeans(0, 3), "num_features must be at least 1, got 0"),
        (lambda: ClassMeans(3, 2.5), "num_classes must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: KernelMemoryUnits(3, 2, key_mem_units=1.5), "key_mem_units must be a whole number"),  # type: ignore[arg-type]
        (lambda: RegularisedDiscriminant(3, 2, rank=1.5), "rank must be a whole number"),  # type: ignore[arg-type]
        (lambda: RandomFeatureRidge(3, 2, seed=1.5), "seed must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_things_are_whole(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
