"""Long work tells its cost when it starts."""

import logging

import pytest
import torch

from mh_lightning import long_work
from mh_lightning.heads import ShrunkClassCovariances
from mh_lightning.long_work import with_cost


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each look at the clock finds it so many seconds later."""
    step, now = [0.0], [0.0]

    def look() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr(long_work.time, "perf_counter", look)
    return step


def test_the_time_of_all_is_told_after_the_first(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock[0] = 0.5
    with_items = with_cost(list(range(30)), "Inverting", "class")
    next(with_items)
    assert not caplog.messages
    assert [next(with_items), *with_items] == list(range(1, 30))
    assert caplog.messages == ["Inverting: 30 times, about 15 s in all"]


def test_what_is_quick_is_done_in_silence(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock[0] = 0.1
    assert list(with_cost(range(30), "Inverting", "class")) == list(range(30))
    assert not caplog.messages


def test_a_head_of_many_covariances_tells(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock[0] = 60.0
    head = ShrunkClassCovariances(3, 5)
    head.update(torch.randn(20, 3), torch.arange(20) % 4)  # of the fifth class there is none
    assert head(torch.randn(1, 3)).shape == (1, 5)
    assert caplog.messages == [
        "ShrunkClassCovariances: inverting covariances of 3 features: 4 times, about 240 s in all"
    ]
