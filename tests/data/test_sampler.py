"""The order of samples, over any number of ranks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mh_lightning.data.sampler import StreamBatchSampler

counts, sizes, seeds, worlds = (
    st.integers(0, 60),
    st.integers(1, 20),
    st.none() | st.integers(0, 2**32 - 1),
    st.integers(1, 5),
)


def interleave(shares: list[list[int]]) -> list[int]:
    """One global batch from what the ranks hold, dealt out in turn."""
    longest = max((len(share) for share in shares), default=0)
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]


def global_batches(num_samples: int, size: int, seed: int | None, even: bool, ranks: int) -> list[list[int]]:
    samplers = [StreamBatchSampler(num_samples, size, seed, even, rank, ranks) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(shares) for shares in batches]
    whole = [size] * (num_samples // size) + [num_samples % size] * (num_samples % size > 0)
    assert all(sampler.sizes == whole for sampler in samplers)
    if even:
        assert {len(rank) for rank in batches} == {len(whole)}
    else:
        assert all(shares for rank in batches for shares in rank)
    steps = max(map(len, batches))
    return [interleave([rank[step] for rank in batches if step < len(rank)]) for step in range(steps)]


@settings(deadline=None)
@given(counts, sizes, seeds, st.booleans(), worlds)
def test_each_sample_comes_once(num_samples: int, size: int, seed: int | None, even: bool, ranks: int) -> None:
    batches = global_batches(num_samples, size, seed, even, ranks)
    assert batches == global_batches(num_samples, size, seed, even, ranks=1)
    assert sorted(index for batch in batches for index in batch) == list(range(num_samples))
    assert all(len(batch) == size for batch in batches[:-1])


def test_order() -> None:
    assert list(StreamBatchSampler(5, 2)) == [[0, 1], [2, 3], [4]]
    shuffled = list(StreamBatchSampler(50, 50, seed=1))
    assert shuffled == list(StreamBatchSampler(50, 50, seed=1)) != list(StreamBatchSampler(50, 50, seed=2))
    assert sorted(shuffled[0]) == list(range(50)) != shuffled[0]
    sampler = StreamBatchSampler(5, 2, seed=0)
    assert list(sampler) == list(sampler)
