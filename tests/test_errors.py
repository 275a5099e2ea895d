"""The one way to refuse a value that is out of range."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mh_lightning
from mh_lightning.errors import UserError, require

BOUNDS = {"at_least": lambda x, b: x >= b, "above": lambda x, b: x > b,
          "at_most": lambda x, b: x <= b, "below": lambda x, b: x < b}  # fmt: skip
numbers = st.floats(allow_nan=True) | st.integers(-3, 3)


@given(numbers, st.sampled_from(["at_least", "above", None]), st.sampled_from(["at_most", "below", None]),
       st.integers(-3, 0), st.integers(0, 3))  # fmt: skip
def test_it_takes_what_lies_between_the_bounds(
    value: float, lower: str | None, upper: str | None, low: int, high: int
) -> None:
    bounds = {name: bound for name, bound in ((lower, low), (upper, high)) if name is not None}
    fits = all(BOUNDS[name](value, bound) for name, bound in bounds.items())
    if fits or (not bounds and not math.isnan(value)):
        require("option", value, **bounds)
    else:
        with pytest.raises(UserError, match=r"^option must .*, got .*\.$"):
            require("option", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"at_least": 1}, "n must be at least 1, got 0."),
        (-1, {"at_least": 0, "below": 2**32}, "n must lie in [0, 2**32), got -1."),
        (1.5, {"above": 0, "at_most": 1}, "n must lie in (0, 1], got 1.5."),
        (math.inf, {"above": 0, "below": math.inf}, "n must be above 0 and finite, got inf."),
        (math.nan, {"above": -math.inf, "below": math.inf}, "n must be finite, got nan."),
        ("two", {"at_least": 1, "or_text": "auto"}, "n must be at least 1, or be 'auto', got 'two'."),
        ("c", {"one_of": ("a", "b")}, "n must be one of a, b; got 'c'."),
    ],
)
def test_sentences(value: object, bounds: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        require("n", value, **bounds)  # type: ignore[arg-type]
    assert str(refusal.value) == said


def test_what_is_left_out_and_the_text_are_taken() -> None:
    require("n", None, at_least=1)
    require("n", "auto", at_least=1, or_text="auto")


def test_ranges_are_told_in_docstrings_from_which_help_is_made() -> None:
    words = re.compile(r"at least|at most|above|one of|[\[(]\d, \S+[\])]|\"")
    untold = []
    for path in sorted((Path(mh_lightning.__file__).parent).rglob("*.py")):
        source = path.read_text()
        for call in re.finditer(r"\brequire\(\s*f?\"([^\"]+)\", .*?(?:at_least|above|one_of)", source):
            name = re.split(r"[.: ]", call[1])[-1]
            told = re.search(rf"\n +{name}: (.*(?:\n {{12}} *.*)*)", source)
            if told is not None and not re.match(r"(int|float|str)\b", told[1]) and not words.search(told[1]):
                untold.append(f"{path.name}: {name}")
    assert not untold
