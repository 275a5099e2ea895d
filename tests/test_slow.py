"""The tables of slow tests name tests that are there."""

from pathlib import Path

import pytest

from tests.slow import EACH, WHOLE

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(WHOLE | EACH.keys()))
def test_names_are_of_tests(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).is_file()
