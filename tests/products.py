"""Tests choose how products are computed; elsewhere the cost rule does, and for tiny layers always in the same way."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mh_lightning.functional import grouped

every_product = pytest.mark.parametrize("by_unit", [False, True], ids=["all_units", "by_unit"])


@contextmanager
def products(by_unit: bool) -> Iterator[None]:
    """Compute products unit by unit, or of all units at once, whatever they cost."""
    before = grouped.GROUPING["cpu"]
    grouped.GROUPING["cpu"] = -(10**18) if by_unit else 10**18
    try:
        yield
    finally:
        grouped.GROUPING["cpu"] = before
