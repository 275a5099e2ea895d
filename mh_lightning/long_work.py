"""Long work says how long it will take, when it starts, and shows how far it is."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from mh_lightning.distributed import process_rank

Item = TypeVar("Item")
LONG = 10.0  # seconds, from which it is worth a line
HIDDEN = 3.0  # seconds before a bar is drawn


def with_cost(items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
    """Items one after the other, whose number and time are told after the first of them if that is much.

    Args:
        items: of which each takes about as long as the others.
        what: is done with them.
        unit: one of them.

    Example:
        >>> list(with_cost([1, 2], "Adding", "number"))
        [1, 2]
    """
    started = time.perf_counter()
    with tqdm(total=len(items), desc=what, unit=unit, leave=False, delay=HIDDEN, disable=process_rank() > 0) as bar:
        for place, item in enumerate(items):
            if place == 1:
                seconds = (time.perf_counter() - started) * len(items)
                if seconds > LONG:
                    rank_zero_info(f"{what}: {len(items):,} times, about {seconds:,.0f} s in all")
            yield item
            bar.update()
