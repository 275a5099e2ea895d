"""Keys that settle: where they come from, where they go, and what is handed over."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.heads.settling_keys import DUPLICATES, SettlingKeys


def points(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(1)


def keys_of(*values: float, units: int, **options: Any) -> SettlingKeys:
    keys = SettlingKeys(units, 1, **options)
    keys.learn(points(*values))
    return keys


def test_the_first_different_samples_become_keys() -> None:
    keys = keys_of(5, 5, 5, 9, units=3, settle=1)
    assert keys.K.flatten().tolist() == [5, 9, 0] and keys.mu.tolist() == [3, 1, 0] and keys.eta.tolist() == [1, 0, 4]
    assert set(keys.attend(points(0.0)).units.flatten().tolist()) == {0, 1}  # the third has no key yet


def test_a_key_is_the_mean_of_what_it_has_won_until_it_settles() -> None:
    values = [0.0, 10.0, 1.0, 2.0, 3.0, 9.0]
    keys = keys_of(*values, units=2, settle=3)
    assert keys.K.flatten().tolist() == [1.0, 9.5]  # of 0, 1 and 2, without 3
    assert keys.mu.tolist() == [4, 2]


def test_the_temperature_is_that_of_the_mean_gap() -> None:
    keys = SettlingKeys(2, 1, settle=1)
    alphas = keys.learn(points(0.0, 4.0, 1.0)).alphas
    gap = (16 + (9 - 1)) / 3  # the first sample has no second key
    assert float(keys.gap) == pytest.approx(gap) and float(keys.nearest) == pytest.approx(1 / 3)
    assert torch.allclose(alphas[2], torch.softmax(torch.tensor([-1.0, -9.0]) * 2 / gap, dim=0))
    attention = keys.attend(points(1.0))
    assert torch.allclose(attention.alphas.flatten(), alphas[2]) and attention.units.flatten().tolist() == [0, 1]


def test_near_duplicates_are_merged_where_nothing_attracts_a_sample() -> None:
    keys = SettlingKeys(3, 1, settle=1)
    learnt = keys.learn(points(0.0, 1.0, 10.0, 0.0, 10.0 + 1.01 * DUPLICATES**0.5))
    assert learnt.moves == [(1, 0, 1.0)]
    assert keys.K.flatten().tolist() == pytest.approx([1 / 3, 10 + 1.01 * DUPLICATES**0.5, 10])
    assert keys.mu.tolist() == [3, 1, 1] and int(keys.scrambling_count) == 1
    assert learnt.alphas[:4, 1].sum() == 0 and torch.allclose(learnt.alphas.sum(dim=1), torch.ones(5))
    again = SettlingKeys(3, 1, settle=1)
    assert not again.learn(points(0.0, 1.0, 10.0, 0.0, 10.0 + 0.99 * DUPLICATES**0.5)).moves


def test_dead_units_are_used_again() -> None:
    stream = [0.0, 100.0, 50.0, *[0.0, 100.0] * 6]  # 50 wins once
    options: dict[str, Any] = {"units": 3, "settle": 1, "tau_mu": 2}
    for age, unit in ((12, 2), (13, None)):
        keys = keys_of(*stream, tau_eta=age, **options)
        moves = keys.learn(points(70.0)).moves
        assert [move.source for move in moves] == ([] if unit is None else [unit])
    keys = keys_of(*stream, tau_eta=12, **options)
    assert not keys.learn(points(0.0)).moves  # which is near to its key


def test_a_new_unit_takes_over_a_share_of_its_neighbour() -> None:
    stream = [0.0] * 30
    for inherited, share in ((12, 0.4), (20, 0.5)):  # at most half
        keys = SettlingKeys(2, 1, settle=1, inherited=inherited)
        keys.learn(points(*stream))
        learnt = keys.learn(points(9.0))
        assert learnt.moves == [(0, 1, pytest.approx(share))]
        assert keys.weight.tolist() == pytest.approx([30 * (1 - share), 30 * share + 1], abs=1e-3)
    keys = SettlingKeys(3, 1, settle=1, inherited=1)  # of the nearest, when a unit is used again as well
    moves = keys.learn(points(0.0, 1.0, 10.0, 0.0, 30.0)).moves
    assert [(move.source, move.target) for move in moves] == [(0, 1), (1, 2), (1, 0), (2, 1)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.lists(st.integers(1, 59), max_size=4, unique=True))
def test_batches_do_not_matter(seed: int, units: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(60, 3, generator=generator).cumsum(dim=0)  # which drifts, so that units are re-used
    options: dict[str, Any] = {"delta": 2, "settle": 3, "tau_mu": 3, "tau_eta": 10, "inherited": 4}
    whole, parts = SettlingKeys(units, 3, **options), SettlingKeys(units, 3, **options)
    learnt = whole.learn(z)
    edges = [0, *sorted(cuts), 60]
    alphas = torch.zeros(0, units)
    for start, end in pairwise(edges):
        part = parts.learn(z[start:end])
        for source, target, share in part.moves:
            alphas[:, target] += share * alphas[:, source]
            alphas[:, source] *= 1 - share
        alphas = torch.cat([alphas, part.alphas])
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name
    assert torch.allclose(alphas, learnt.alphas, atol=1e-6)
    assert torch.allclose(learnt.alphas.sum(dim=1), torch.ones(60), atol=1e-5)
    assert torch.allclose(learnt.alphas.sum(dim=0).double(), whole.weight, atol=1e-4)
    assert int(whole.key_counter.sum()) == int(whole.mu.sum()) == int(whole.seen) == 60


@pytest.mark.parametrize("name", ["key_mem_units", "delta", "settle"])
def test_options_out_of_range(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        SettlingKeys(**{"key_mem_units": 2, "key_size": 1, name: 0})


@pytest.mark.parametrize("place", [0.0, 100.0, 1e4])
def test_attends_by_squared_distances_also_far_from_the_origin(place: float) -> None:
    z = place + torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    keys = SettlingKeys(6, 5, delta=3)
    keys.learn(z)
    attention = keys.attend(z)
    squared = torch.cdist(z.double(), keys.K.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest, units = squared.sort(dim=1)
    expected = torch.softmax(-2 / keys.gap * nearest[:, :3], dim=1)
    assert torch.equal(attention.units.squeeze(1), units[:, :3])
    torch.testing.assert_close(attention.alphas.squeeze(1).double(), expected, atol=1e-3, rtol=0)
