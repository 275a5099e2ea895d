"""What stays in a buffer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mh_lightning.errors import UserError
from mh_lightning.methods.replay_buffer import (
    ClassBalancedBuffer,
    RandomReplacementBuffer,
    ReplayBuffer,
    ReservoirBuffer,
)

KINDS = [ReservoirBuffer, RandomReplacementBuffer, ClassBalancedBuffer]


def stream(samples: int, shape: tuple[int, ...] = (1,)) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample is its own number; classes take turns, tasks are tens."""
    numbers = torch.arange(samples)
    return numbers.float().view(-1, *[1] * len(shape)).expand(samples, *shape), numbers % 3, numbers // 10


def filled(kind: type[ReplayBuffer], capacity: int, samples: int, batch: int, seed: int = 0) -> ReplayBuffer:
    buffer = kind(capacity, num_classes=3, seed=seed)
    for part in zip(*(column.split(batch) for column in stream(samples)), strict=True):
        buffer.add(*part)
    return buffer


def kept(buffer: ReplayBuffer) -> list[int]:
    return buffer.content()[0].flatten().int().tolist()


@pytest.mark.parametrize("batch", [1, 7, 12])
def test_a_reservoir_keeps_each_sample_with_the_same_probability(batch: int) -> None:
    capacity, samples, runs = 3, 12, 1000
    counts = np.zeros(samples)
    for seed in range(runs):
        numbers = kept(filled(ReservoirBuffer, capacity, samples, batch, seed))
        assert len(set(numbers)) == capacity
        counts[numbers] += 1
    expected = runs * capacity / samples
    # chi-square with 11 degrees of freedom: 31 is exceeded once in a thousand
    assert ((counts - expected) ** 2 / expected).sum() / (1 - capacity / samples) < 31


def test_random_replacement_keeps_the_newest() -> None:
    capacity, samples, runs = 5, 60, 800
    ages = np.concatenate([samples - 1 - np.array(kept(filled(RandomReplacementBuffer, capacity, samples, 4, seed)))
                           for seed in range(runs)])  # fmt: skip
    # a sample stays with probability 1 - 1/capacity at each later one: ages are geometric, with mean capacity - 1
    assert abs(ages.mean() - (capacity - 1)) < 0.3
    assert (ages == 0).mean() == pytest.approx(1 / capacity, abs=0.01)  # the last sample is always there


def test_greedy_balance_by_hand() -> None:
    buffer = ClassBalancedBuffer(4, num_classes=3)

    def add(*labels: int) -> list[int]:
        numbers = torch.arange(len(labels)).float().view(-1, 1)
        buffer.add(numbers, torch.tensor(labels), torch.zeros(len(labels)))
        return torch.bincount(buffer.content()[1], minlength=3).tolist()

    assert add(0, 0, 0, 0) == [4, 0, 0]
    assert add(0) == [4, 0, 0]  # the largest class gets no more
    assert add(1) == [3, 1, 0]
    assert add(1, 1) == [2, 2, 0]  # the third would make class 1 the largest
    assert add(2) in ([1, 2, 1], [2, 1, 1])
    assert sorted(add(2, 2, 2, 2, 2, 1, 0)) == [1, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_contents_stay_together(kind: type[ReplayBuffer]) -> None:
    inputs, targets, tasks = filled(kind, 8, 50, batch=3).content()
    numbers = inputs.flatten().long()
    assert torch.equal(targets, numbers % 3) and torch.equal(tasks, numbers // 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (4,), (3, 2, 2)])
def test_any_shape_and_less_than_full(kind: type[ReplayBuffer], shape: tuple[int, ...]) -> None:
    buffer = kind(9, num_classes=3)
    assert buffer.draw(2) is None and len(buffer) == 0
    buffer.add(*stream(5, shape))
    drawn = buffer.draw(10)
    assert drawn is not None
    assert drawn[0].shape == (5, *shape) and sorted(drawn[0].reshape(5, -1)[:, 0].tolist()) == [0, 1, 2, 3, 4]


def test_draws_are_different_samples_and_differ_as_the_stream_goes_on() -> None:
    buffer = filled(ReservoirBuffer, 20, 20, batch=20)
    first, again = buffer.draw(5), buffer.draw(5)
    assert first is not None and again is not None
    assert len(set(first[0].flatten().tolist())) == 5 and torch.equal(first[0], again[0])
    buffer.add(*stream(1))
    later = buffer.draw(5)
    assert later is not None and not torch.equal(first[0], later[0])
    earlier_tasks = buffer.draw(20, before_task=1)
    assert earlier_tasks is not None and set(earlier_tasks[2].tolist()) == {0}
    assert buffer.draw(20, before_task=0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_buffer_goes_on_alike(kind: type[ReplayBuffer]) -> None:
    whole, half = filled(kind, 6, 60, batch=5, seed=3), filled(kind, 6, 30, batch=5, seed=3)
    resumed = kind(6, num_classes=3, seed=3)
    resumed.load_state_dict(half.state_dict())
    for part in zip(*(column[30:].split(5) for column in stream(60)), strict=True):
        resumed.add(*part)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_samples_of_another_shape() -> None:
    buffer = ReservoirBuffer(4, num_classes=3)
    buffer.add(*stream(3, (4,)))
    with pytest.raises(UserError, match=r"holds samples of shape \(4,\), and the stream gives \(3, 2\)"):
        buffer.add(*stream(3, (3, 2)))


def test_too_small() -> None:
    with pytest.raises(UserError, match="buffer_size=2 is smaller than the 3 classes"):
        ReservoirBuffer(2, num_classes=3)
