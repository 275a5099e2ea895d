import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mh_lightning.experiments.statistics import mean_interval, paired_difference


def test_interval_worked_by_hand() -> None:
    # deviations -1, 0, 1: standard deviation 1; t(0.975; 2) = 4.3027 in every table
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert interval.number == 3
    assert not interval.excludes_zero


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=20).filter(lambda values: len({round(v, 3) for v in values}) > 1)
)
def test_interval_is_that_of_scipy(values: list[float]) -> None:
    interval = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert interval.half_width is not None
    assert interval.mean - interval.half_width == pytest.approx(low, abs=1e-9)
    assert interval.mean + interval.half_width == pytest.approx(high, abs=1e-9)


def test_one_value_has_no_interval_and_shows_nothing() -> None:
    interval = mean_interval([0.4])
    assert interval == (0.4, None, 1)
    assert not interval.excludes_zero


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.0, 3)
    assert not mean_interval([0.0, 0.0]).excludes_zero


def test_paired_difference_worked_by_hand() -> None:
    # differences 0.1, 0.2, 0.3; their spread is much smaller than that of the values
    baseline = {(0, None): 0.1, (1, None): 0.5, (2, None): 0.6, (9, None): 0.9}
    values = {(0, None): 0.2, (1, None): 0.7, (2, None): 0.9, (8, None): 0.0}
    difference = paired_difference(values, baseline)
    assert difference is not None
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert difference.number == 3
    tighter = paired_difference({0: 0.2, 1: 0.7}, {0: 0.1, 1: 0.6})
    assert tighter is not None
    assert tighter.excludes_zero


def test_nothing_in_common_gives_no_difference() -> None:
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
