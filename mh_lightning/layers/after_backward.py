"""Work that waits for the end of a backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Collected(list[Any]):
    """What one backward pass has collected for one owner. The engine keeps it alive until the pass has ended; if the
    pass fails, it is gone with it.
    """


_collected: WeakValueDictionary[tuple[int, int], _Collected] = WeakValueDictionary()


def after_backward(output: Tensor, owner: object, item: Any, finish: Callable[[list[Any]], None]) -> None:
    """Hand `item` to `finish` at the end of the first backward pass that reaches `output`.

    Values that a graph has saved may be changed then, and not before. A pass that reaches several outputs of one owner
    calls `finish` once, with all their items.

    Args:
        output: tensor in a graph, no view.
        owner: whose outputs belong together.
        item: what to hand over.
        finish: called with the list of items, in no particular order.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = x * 2
        >>> after_backward(y, owner=x, item="reached", finish=print)
        >>> (y * 3).backward()
        ['reached']
    """
    seen = False  # a graph that is kept may be back-propagated again

    def collect(_: Tensor) -> None:
        nonlocal seen
        if seen:
            return
        seen = True
        place = (torch._C._current_graph_task_id(), id(owner))
        collected = _collected.get(place)
        if collected is None:
            collected = _collected[place] = _Collected()
            torch.autograd.Variable._execution_engine.queue_callback(partial(finish, collected))
        collected.append(item)

    output.register_hook(collect)  # type: ignore[no-untyped-call]
