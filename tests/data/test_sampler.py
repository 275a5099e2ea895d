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
    assert all(shares for rank in batches for shares in rank)
    if even:
        assert len({tuple(map(len, rank)) for rank in batches}) == 1
    steps = max(map(len, batches))
    return [interleave([rank[step] for rank in batches if step < len(rank)]) for step in range(steps)]


@settings(deadline=None)
@given(counts, sizes, seeds, worlds)
def test_evaluation_sees_each_sample_once(num_samples: int, size: int, seed: int | None, ranks: int) -> None:
    batches = global_batches(num_samples, size, seed, even=False, ranks=ranks)
    assert batches == global_batches(num_samples, size, seed, even=False, ranks=1)
    assert sorted(index for batch in batches for index in batch) == list(range(num_samples))
    assert all(len(batch) == size for batch in batches[:-1])


@settings(deadline=None)
@given(counts, st.integers(1, 6), seeds, worlds)
def test_training_deals_out_evenly(num_samples: int, per_rank: int, seed: int | None, ranks: int) -> None:
    size = per_rank * ranks  # the data module asks for a multiple
    batches = global_batches(num_samples, size, seed, even=True, ranks=ranks)
    whole = global_batches(num_samples, size, seed, even=True, ranks=1)
    dealt = [batch[: len(batch) // ranks * ranks] for batch in whole]
    assert batches == [batch for batch in dealt if batch]
    assert sum(map(len, whole)) == num_samples


def test_order() -> None:
    assert list(StreamBatchSampler(5, 2)) == [[0, 1], [2, 3], [4]]
    shuffled = list(StreamBatchSampler(50, 50, seed=1))
    assert shuffled == list(StreamBatchSampler(50, 50, seed=1)) != list(StreamBatchSampler(50, 50, seed=2))
    assert sorted(shuffled[0]) == list(range(50)) != shuffled[0]
    sampler = StreamBatchSampler(5, 2, seed=0)
    assert list(sampler) == list(sampler)
