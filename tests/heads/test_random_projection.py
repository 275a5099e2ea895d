"""Ridge regression on random projections, against direct solutions."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.heads import RandomProjectionRidge
from mh_lightning.heads.random_projection import EXPONENTS, best_exponent, draw_held_out, ridge_weights
from tests.blobs import CLASSES, FEATURES, blobs

PROJECTIONS = 40


def learnt(samples: int, scale: float = 1.0, noise: float = 0.0) -> tuple[RandomProjectionRidge, Tensor, Tensor]:
    """A head, the samples' h in float64, and their one-hot classes."""
    x, targets = blobs(samples, 1)
    if noise:
        swapped = torch.rand(samples, generator=torch.Generator().manual_seed(2)) < noise
        targets = torch.where(swapped, targets.flip(0), targets)
    x = scale * x
    head = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=0)
    for batch in zip(x.split(16), targets.split(16), strict=True):
        head.update(*batch)
    head.settle()
    return head, torch.relu(x.double() @ head.projection.matrix.double()), F.one_hot(targets, CLASSES).double()


def held_out_error(hidden: Tensor, one_hot: Tensor, exponent: int) -> float:
    """What the sums must tell, computed from the samples."""
    held_out = torch.from_numpy(draw_held_out(0, 0, len(hidden)))
    fit, wanted = hidden[~held_out], one_hot[~held_out]
    weights = torch.linalg.solve(fit.T @ fit + 10.0**exponent * torch.eye(PROJECTIONS), fit.T @ wanted)
    return float((one_hot[held_out] - hidden[held_out] @ weights).square().sum())


@pytest.mark.parametrize("samples", [4, 100, 2000])
def test_is_scikit_learns_ridge_of_all_samples(samples: int) -> None:
    x, targets = blobs(max(samples, CLASSES), 1)
    head = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=3)
    head.update(x[:samples], targets[:samples])
    logits = head(x)
    hidden = torch.relu(x.double() @ head.projection.matrix.double())
    reference = Ridge(alpha=float(head.ridge), fit_intercept=False)
    reference.fit(hidden[:samples].numpy(), F.one_hot(targets[:samples], CLASSES).double().numpy())
    expected = torch.from_numpy(reference.predict(hidden.numpy())).float()
    seen = head.counts > 0
    torch.testing.assert_close(logits[:, seen], expected[:, seen], rtol=1e-3, atol=1e-3)
    if samples == 4:
        assert head.held_out.sum() == int(draw_held_out(3, 0, 4).sum()) and (head.ridge == 1 or head.held_out.any())


@pytest.mark.parametrize("exponent", [-2, 0, 2, 5])
def test_the_error_of_what_is_held_out_follows_from_sums(exponent: int) -> None:
    head, hidden, one_hot = learnt(400)
    weights = ridge_weights(head.gram[0], head.class_sums[0], 10.0**exponent)
    assert weights is not None and head.held_out.sum() == 80
    error = 80 - 2 * (weights * head.class_sums[1]).sum() + (weights @ head.gram[1] @ weights.T).trace()
    assert float(error) == pytest.approx(held_out_error(hidden, one_hot, exponent), rel=1e-4)


@pytest.mark.parametrize("samples", [30, 60, 400])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_ridge_is_the_best_of_all(samples: int, scale: float, noise: float) -> None:
    head, hidden, one_hot = learnt(samples, scale, noise)
    head.solve()
    chosen = round(np.log10(float(head.ridge)))
    errors = {exponent: held_out_error(hidden, one_hot, exponent) for exponent in EXPONENTS}
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-4)
    again = float(head.ridge)
    head.solve()  # starts from the last choice, and stays
    assert head.ridge == again


@pytest.mark.parametrize("best", EXPONENTS)
@pytest.mark.parametrize("last", [None, *EXPONENTS[::3]])
@pytest.mark.parametrize("failing", [-8, 0])
def test_the_search_finds_a_single_minimum(best: int, last: int | None, failing: int) -> None:
    tried: list[int] = []

    def error(exponent: int) -> float:
        tried.append(exponent)
        return float("inf") if exponent < failing else abs(exponent - best)

    assert best_exponent(error, last) == max(best, failing)
    assert len(tried) == len(set(tried)) or (last is not None and last < failing)
    if last == best >= failing:
        assert len(tried) <= 3


def test_a_large_ridge_replaces_one_that_rounding_makes_too_small() -> None:
    head, _, _ = learnt(100)
    for part, value in enumerate((1.0, -1.5)):  # what is held out wants the least ridge; together that is indefinite
        head.gram[part] = value * torch.eye(PROJECTIONS)
    assert all(part.isfinite().all() for part in head.solve()) and head.ridge == 1
    head.gram.fill_(float("nan"))
    with pytest.raises(UserError, match=r"num_projections=40: no ridge up to 1e8"):
        head.solve()


def test_what_is_held_out_is_drawn_by_the_seed() -> None:
    masks = {seed: draw_held_out(seed, 0, 5000) for seed in (0, 1)}
    assert (masks[0] != masks[1]).mean() > 0.2
    for seed, mask in masks.items():
        assert (mask.reshape(-1, 5).sum(axis=1) == 1).all()  # one of each five
        by_place = mask.reshape(-1, 5).sum(axis=0)  # 200 expected, with a deviation of 13
        assert by_place.min() > 140 and by_place.max() < 260
        for size in (3, 7, 4999):
            parts = [draw_held_out(seed, first, min(size, 5000 - first)) for first in range(0, 5000, size)]
            assert np.array_equal(np.concatenate(parts), mask)


@pytest.mark.parametrize("seed", [0, 1])
def test_classes_that_cycle_with_the_period_of_the_held_out_part(seed: int) -> None:
    targets = torch.arange(1000) % 5
    x = F.one_hot(targets, 5).float() + 0.3 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(seed))
    head = RandomProjectionRidge(5, 5, PROJECTIONS, seed=seed)
    head.update(x, targets)
    head.settle()
    assert head.held_out.sum() == 200 and head.held_out.min() > 15  # 40 expected, with a deviation of 6


@pytest.mark.parametrize("size", [1, 7, 100, 1500])
def test_batches_resumption_and_waiting_hold_out_the_same(size: int) -> None:
    x, targets = blobs(1500, 4)
    heads = [RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=5) for _ in range(2)]
    heads[0].update(x, targets)
    for batch in zip(x.split(size), targets.split(size), strict=True):
        heads[1].update(*batch)
        if int(batch[1][0]) == 6:  # somewhere
            resumed = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=5)
            resumed.load_state_dict(heads[1].state_dict())
            heads[1] = resumed
    for name, value in heads[0].state_dict().items():
        torch.testing.assert_close(heads[1].state_dict()[name], value, rtol=1e-5, atol=1e-3)
    assert torch.equal(heads[0].held_out, heads[1].held_out) and heads[0].held_out.sum() == 300


@pytest.mark.parametrize("seed", [0, 1])
def test_an_offset_costs_no_digits(seed: int) -> None:
    x, targets = blobs(600, 1, offset=1e4)
    queries = blobs(200, 2, offset=1e4)[0]
    head = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=seed)
    head.update(x, targets)
    logits = head(queries)

    def hidden(rows: Tensor) -> Tensor:
        return torch.relu(rows.double() @ head.projection.matrix.double())

    reference = Ridge(alpha=float(head.ridge), fit_intercept=False, solver="svd")
    reference.fit(hidden(x).numpy(), F.one_hot(targets, CLASSES).double().numpy())
    expected = torch.from_numpy(reference.predict(hidden(queries).numpy()))
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-3)
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


def test_the_projection_is_drawn_again_and_belongs_to_its_seed() -> None:
    head, _, _ = learnt(100)
    state = copy.deepcopy(head.state_dict())
    assert "projection" not in state
    torch.manual_seed(5)
    same = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS)
    assert int(same.projection.seed) == 5
    other = RandomProjectionRidge(FEATURES, CLASSES, PROJECTIONS, seed=1)
    same.load_state_dict(state)
    x = blobs(50, 2)[0]
    assert torch.equal(same(x), head(x)) and not torch.equal(other.projection.matrix, head.projection.matrix)
    with pytest.raises(UserError, match="seed=1: the state was learnt with seed=0; give that one"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_projections": 0}, "num_projections must be at least 1, got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], part: str) -> None:
    with pytest.raises(UserError, match=part):
        RandomProjectionRidge(2, 2, **options)
