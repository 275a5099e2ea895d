"""Samples within a number of bytes."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from mh_lightning.functional.codes import bytes_of_code, decode, encode, turn, turn_back
from mh_lightning.heads.sample_store import SampleStore, draw_places

N = 64


def unit_vectors(samples: int, features: int = N) -> torch.Tensor:
    return F.normalize(torch.randn(samples, features, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize("features", [1, 2, 5, 64, 1280])
def test_turning_keeps_distances_and_can_be_undone(features: int) -> None:
    z = unit_vectors(20, features).double()
    signs = torch.where(torch.arange(features) % 3 == 0, -1.0, 1.0).double()
    torch.testing.assert_close(turn(z, signs) @ turn(z, signs).T, z @ z.T)
    torch.testing.assert_close(turn_back(turn(z, signs), signs), z)


@pytest.mark.parametrize(("bits", "lost"), [(64, 1e-15), (16, 1e-6), (8, 1e-3), (4, 0.011)])
def test_codes_lose_what_their_bits_say(bits: int, lost: float) -> None:
    z = unit_vectors(500, 255)
    codes = encode(z, bits)
    assert codes.shape == (500, bytes_of_code(255, bits)) and codes.dtype == torch.uint8
    error = (decode(codes, bits, 255) - z).square().sum(dim=1).mean()
    assert lost / 100 < float(error) < lost or (bits == 64 and float(error) == 0)
    assert torch.equal(encode(decode(codes, bits, 255), bits), codes)


def test_uses_fewer_bits_before_it_drops_a_sample() -> None:
    z, targets = unit_vectors(400), torch.arange(400)
    store = SampleStore(N, 38 * 100 + 4 * N, (16, 8, 4))  # 100 samples of 4 bits with their lengths and classes
    assert sum(buffer.nbytes for buffer in (store.pool, store.labels, store.lengths, store.origin)) == 38 * 100 + 4 * N
    assert store.capacity(16) == 25 and store.capacity(8) == 50 and store.capacity(4) == 100
    for count, bits in ((25, 16), (50, 8), (100, 4)):
        store.add(z[int(store.seen) : count], targets[int(store.seen) : count], seed=0)
        kept, labels = store.kept()
        assert int(store.bits) == bits and labels.tolist() == list(range(count))
        assert float((kept - z[:count]).square().sum(dim=1).max()) < 0.03
    store.add(z[100:], targets[100:], seed=0)
    kept, labels = store.kept()
    assert len(kept) == 100 and len(set(labels.tolist())) == 100
    assert float((kept - z[labels]).square().sum(dim=1).max()) < 0.03


def test_early_and_late_samples_are_kept_alike() -> None:
    quarters = torch.zeros(4)
    for seed in range(60):
        store = SampleStore(1, 12 * 50, (64,))
        store.add(torch.zeros(200, 1), torch.arange(200), seed)
        quarters += torch.bincount(store.labels.long() // 50, minlength=4)
    # 3,000 draws of 4 quarters: standard deviation 21 with replacement, less without
    assert quarters.sum() == 3000 and float((quarters - 750).abs().max()) < 75


@pytest.mark.parametrize("cut", [1, 3, 50, 399])
def test_draws_follow_the_place_in_the_stream(cut: int) -> None:
    places = torch.arange(30)
    for first, samples in ((30, cut), (30 + cut, 400 - cut)):
        new, rows = draw_places(7, first, samples, 30)
        places[torch.from_numpy(new)] = torch.from_numpy(rows) + first
    whole = torch.arange(30)
    new, rows = draw_places(7, 30, 400, 30)
    whole[torch.from_numpy(new)] = torch.from_numpy(rows) + 30
    assert torch.equal(places, whole)


def in_four_bits(z: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """What a store keeps of vectors (300, 64), and what it warns of."""
    store = SampleStore(64, 300 * 60, (16, 8, 4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store.add(z, torch.zeros(300, dtype=torch.long), 0)
    assert int(store.bits) == 4 and len(store) == 300
    return store.kept()[0], [str(one.message) for one in told]


@pytest.mark.parametrize("spread", [1.0, 0.02, 0.002])
def test_what_all_samples_share_costs_no_digits(spread: float) -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    z = F.normalize(spread * x + torch.ones(64), dim=1).double()
    kept, told = in_four_bits(z)
    apart = (z - z.mean(dim=0)).square().sum(dim=1).mean()
    assert not told and float((kept - z).square().sum(dim=1).mean() / apart) < 0.03


def test_codes_that_hide_what_tells_samples_apart_are_told() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    far_groups_of_alike = F.normalize(x[torch.arange(300) % 5] + 0.02 * x, dim=1)
    for z, hides in ((F.normalize(x, dim=1), False), (far_groups_of_alike, True)):
        _, told = in_four_bits(z)
        assert bool(told) == hides and all(message.startswith("max_bytes: ") for message in told)
