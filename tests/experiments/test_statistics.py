import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mh_lightning.errors import UserError
from mh_lightning.experiments.statistics import Interval, Key, mean_interval, paired_difference


def seeds(*values: float) -> dict[Key, float]:
    """One run a seed, in the order of the configuration."""
    return {(seed, None): value for seed, value in enumerate(values)}


def crossed(table: list[list[float]]) -> dict[Key, float]:
    """A row a seed, a column a class order."""
    return {(seed, order): value for seed, row in enumerate(table) for order, value in enumerate(row)}


def test_interval_worked_by_hand() -> None:
    # deviations -1, 0, 1: standard deviation 1; t(0.975; 2) = 4.3027 in every table
    interval = mean_interval(seeds(1.0, 2.0, 3.0))
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert interval[2:] == (3, 3, 1)
    assert not interval.excludes_zero


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=20).filter(lambda values: len({round(v, 3) for v in values}) > 1)
)
def test_interval_of_seeds_is_that_of_scipy(values: list[float]) -> None:
    interval = mean_interval(seeds(*values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert interval.half_width is not None
    assert interval.mean - interval.half_width == pytest.approx(low, abs=1e-9)
    assert interval.mean + interval.half_width == pytest.approx(high, abs=1e-9)


def test_a_method_that_ignores_the_order_has_a_value_a_seed() -> None:
    # two values .1 apart: .1 / 2 * t(0.975; 1) = .05 * 12.7062, however often each was found
    interval = mean_interval(crossed([[0.6, 0.6, 0.6], [0.7, 0.7, 0.7 + 1e-16]]))
    assert interval.mean == pytest.approx(0.65)
    assert interval.half_width == pytest.approx(0.05 * 12.70620, rel=1e-5)
    assert interval[2:] == (6, 2, 1)


def test_a_method_that_ignores_the_seed_has_a_value_an_order() -> None:
    one = mean_interval(crossed([[0.6, 0.7, 0.5], [0.6, 0.7, 0.5], [0.6, 0.7, 0.5]]))
    assert one.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert one[2:] == (9, 1, 3)
    assert mean_interval(crossed([[0.6, 0.7, 0.5]]))[2:] == (3, 1, 3)  # a single seed


def test_a_missing_run_does_not_move_a_value_that_is_known() -> None:
    values = crossed([[0.6, 0.6, 0.6], [0.7, 0.7, 0.7]])
    del values[1, 0]
    assert mean_interval(values) == mean_interval(seeds(0.6, 0.7))._replace(runs=5)


@pytest.mark.parametrize("values", [seeds(0.4), seeds(0.5, 0.5, 0.5), crossed([[0.5, 0.5], [0.5, 0.5]])])
def test_one_value_has_no_interval_and_shows_nothing(values: dict[Key, float]) -> None:
    interval = mean_interval(values)
    assert interval == Interval(values[0, next(iter(values))[1]], None, len(values), 1, 1)
    assert not interval.excludes_zero


def test_seeds_and_orders_worked_by_hand() -> None:
    # seed means 2, 4: squared standard error 1; order means 2, 3, 4: 1 / 3; t² of 1 and 2 degrees 161.448 and 18.5128
    interval = mean_interval(crossed([[1, 2, 3], [3, 4, 5]]))
    assert interval.mean == 3
    assert interval.half_width == pytest.approx(math.sqrt(161.448 + 18.5128 / 3), rel=1e-5)
    assert interval[2:] == (6, 2, 3)


def test_means_that_agree_by_chance_do_not_hide_the_runs() -> None:
    # seed means and order means are all .5, but four runs are 0, 1, 1, 0: t(0.975; 3) = 3.18245, deviation 1 / sqrt(3)
    interval = mean_interval(crossed([[0, 1], [1, 0]]))
    assert interval.half_width == pytest.approx(3.18245 / math.sqrt(3) / 2, rel=1e-5)


def test_orders_of_each_seed_worked_by_hand() -> None:
    # seed means 2 and 4: half their difference, t(0.975; 1) = 12.7062; an order's part cannot be told from a run's
    nested: dict[Key, float] = {(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 3): 3, (1, 4): 4, (1, 5): 5}
    interval = mean_interval(nested)
    assert interval == Interval(3, pytest.approx(12.7062, rel=1e-5), 6, 2, 1)
    mirrored = mean_interval({(order, seed): value for (seed, order), value in nested.items()})
    assert mirrored == interval._replace(seeds=1, orders=2)


def test_seeds_of_unlike_numbers_of_runs_worked_by_hand() -> None:
    # seed means 2 and 5; (3² + 1) / 4² = .625, times their squared deviation 4.5: t(0.975; 1) * sqrt(2.8125)
    interval = mean_interval({(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 3): 5})
    assert interval == Interval(2.75, pytest.approx(12.7062 * math.sqrt(2.8125), rel=1e-5), 4, 2, 1)


def test_an_order_of_its_own_for_each_seed_is_as_none() -> None:
    assert mean_interval({(0, 7): 1, (1, 8): 2, (2, 9): 3}) == mean_interval(seeds(1, 2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named(value: float) -> None:
    with pytest.raises(UserError, match=f"seed 1 and class order None has the value {value}; leave it out"):
        mean_interval(seeds(0.5, value, 0.7))


def drawn(levels: tuple[int, int], variances: tuple[float, float, float], missing: int) -> Iterator[dict[Key, float]]:
    """Runs whose expectation is 0, by the model of random effects."""
    draws, rng = 1500, np.random.default_rng(7)
    of_seeds, of_orders = rng.standard_normal((draws, levels[0], 1)), rng.standard_normal((draws, 1, levels[1]))
    parts = of_seeds, of_orders, rng.standard_normal((draws, *levels))
    for table in sum(math.sqrt(variance) * part for variance, part in zip(variances, parts, strict=True)):
        runs = list(crossed(table.tolist()).items())
        yield dict(runs[place] for place in rng.permutation(len(runs))[missing:])


CROSSED = ((2, 3), (3, 3), (5, 5), (10, 3), (10, 10))
ALL = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0.1, 1, 0.1))


@pytest.mark.parametrize(
    ("levels", "variances", "missing"),
    [
        *((levels, variances, 0) for levels in CROSSED for variances in ALL),
        *((levels, variances, 1) for levels in ((2, 3), (5, 5)) for variances in ALL),
        *(((5, 5), variances, 6) for variances in ALL),
        ((1, 5), (0, 1, 0.5), 0),
        ((5, 1), (1, 0, 0.5), 0),
    ],
)
def test_intervals_cover(levels: tuple[int, int], variances: tuple[float, float, float], missing: int) -> None:
    intervals = [mean_interval(values) for values in drawn(levels, variances, missing)]
    covered = [not interval.excludes_zero for interval in intervals]
    assert all(interval.half_width is not None for interval in intervals)
    assert np.mean(covered) >= 0.93
    # with variance from one factor alone it is no wider than that factor's t-interval, which covers 95%
    if sorted(variances) == [0, 0, 1] and variances[2] == 0:
        assert np.mean(covered) <= 0.97


# by seed and order
DESIGNS: dict[str, list[tuple[int, int]]] = {
    "two seeds, each with orders of its own": [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)],
    "five seeds, each with orders of its own": [(seed, 5 * seed + order) for seed in range(5) for order in range(5)],
    "ten orders, each with seeds of its own": [(2 * order + seed, order) for order in range(10) for seed in (0, 1)],
    "one seed has most": [*((0, order) for order in range(8)), (1, 8), (2, 9)],
    "two of three": [(0, 0), (0, 1), (1, 2)],
    "three of four": [(0, 0), (0, 1), (1, 1)],
    "one row and one column": [*((0, order) for order in range(5)), *((seed, 0) for seed in range(1, 5))],
    "the first of a second row": [*((0, order) for order in range(5)), (1, 0)],
    "triangle": [(seed, order) for seed in range(5) for order in range(seed + 1)],
    "two blocks": [
        (3 * block + seed, 3 * block + order) for block in (0, 1) for seed in range(3) for order in range(3)
    ],
    "a block and one run": [*((seed, order) for seed in range(3) for order in range(3)), (3, 3)],
    "an order of its own for each seed": [(seed, seed) for seed in range(5)],
}


@pytest.mark.parametrize("variances", [*ALL, (1, 0, 0.01), (1, 0.1, 0.1), (0.01, 1, 0.01), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_of_incomplete_designs_cover(design: str, variances: tuple[float, float, float]) -> None:
    pairs = DESIGNS[design]
    levels = max(seed for seed, _ in pairs) + 1, max(order for _, order in pairs) + 1
    intervals = [mean_interval({pair: values[pair] for pair in pairs}) for values in drawn(levels, variances, 0)]
    assert np.mean([not interval.excludes_zero for interval in intervals]) >= 0.93


def test_the_paired_difference_covers_where_one_ignores_orders_and_the_other_seeds() -> None:
    hits = []
    for values in drawn((5, 5), (1, 1, 0), 0):
        of_seed = {key: values[key[0], 0] for key in values}
        of_order = {key: of_seed[key] - values[key] for key in values}  # additive: what is left depends on the order
        difference = paired_difference(of_seed, of_order)
        assert difference is not None
        assert difference[2:] == (25, 5, 5)
        hits.append(not difference.excludes_zero)
    assert np.mean(hits) >= 0.93


def test_paired_difference_worked_by_hand() -> None:
    # differences 0.1, 0.2, 0.3; their spread is much smaller than that of the values
    baseline: dict[Key, float] = {(0, None): 0.1, (1, None): 0.5, (2, None): 0.6, (9, None): 0.9}
    values: dict[Key, float] = {(0, None): 0.2, (1, None): 0.7, (2, None): 0.9, (8, None): 0.0}
    difference = paired_difference(values, baseline)
    assert difference is not None
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert difference[2:] == (3, 3, 1)
    tighter = paired_difference(seeds(0.2, 0.7, 0.8), seeds(0.1, 0.6, 0.69))
    assert tighter is not None
    assert tighter.excludes_zero


def test_a_difference_of_two_single_values_excludes_nothing() -> None:
    difference = paired_difference(crossed([[0.9, 0.9], [0.9, 0.9]]), crossed([[0.7, 0.7], [0.7, 0.7]]))
    assert difference is not None
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width is None
    assert not difference.excludes_zero


def test_nothing_in_common_gives_no_difference() -> None:
    assert paired_difference({(1, None): 0.5}, {(2, None): 0.5}) is None
