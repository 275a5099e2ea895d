"""What holds for every closed-form head."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mh_lightning.layers import (
    ClassMeans,
    ClosedFormHead,
    RandomProjectionRidge,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
)
from mh_lightning.layers.closed_form import ROWS
from tests.blobs import CLASSES, FEATURES, blobs

Make = Callable[[], ClosedFormHead]
HEADS: dict[str, Make] = {
    "means": lambda: ClassMeans(FEATURES, CLASSES),
    "discriminant": lambda: StreamingLinearDiscriminant(FEATURES, CLASSES),
    "covariances": lambda: ShrunkClassCovariances(FEATURES, CLASSES),
    "ridge": lambda: RandomProjectionRidge(FEATURES, CLASSES, num_projections=20),
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
    if not isinstance(whole, RandomProjectionRidge):  # every fifth sample chooses the ridge, so order matters there
        shuffler.shuffle(batches)
    for batch in batches:
        parts.update(*batch)
        if shuffler.random() < 0.2:
            parts.settle()
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-5)
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
