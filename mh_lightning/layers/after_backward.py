"""Work that waits for the end of a backward pass."""

import itertools
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mh_lightning.compat.torch_names import backward_at_work, is_in_backward_of_a_node
from mh_lightning.errors import UserError

NO_PASS = -1

_outputs = itertools.count()


class _Collected(list[tuple[tuple[bool, int, int], Any]]):
    """What one backward pass has collected for one owner, each item with its place in the order. The engine keeps it
    alive until the pass has ended; if the pass fails, it is gone with it.
    """


_collected: WeakValueDictionary[tuple[int, int], _Collected] = WeakValueDictionary()


def after_backward(
    output: Tensor, owner: object, reached: Callable[[Tensor], Any], finish: Callable[[list[Any]], None]
) -> None:
    """Hand what `reached` returns to `finish` at the end of the first backward pass that reaches `output`.

    Values that a graph has saved may be changed then, and not before. A pass that reaches several outputs of one owner
    calls `finish` once, with all their items, in the order in which the outputs were made. An output that is made
    during a backward pass, as reentrant checkpointing does, and passed by another one inside of it, belongs to the
    outer pass, which may make outputs from the same values again; it comes after what was made before. Checkpoints are
    made again from the last to the first, so they are put in the opposite order, which is that of their forwards.

    Args:
        output: tensor in a graph, no view.
        owner: whose outputs belong together.
        reached: called with the output's gradient by every pass that reaches it; may raise.
        finish: called with the list of items.

    Raises:
        UserError: at the end of a pass, if outputs were made in a pass inside of another one: the outermost is not
            known then.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = x * 2
        >>> after_backward(y, owner=x, reached=lambda gradient: gradient.item(), finish=print)
        >>> (y * 3).backward()
        [3.0]
    """
    seen = False  # a graph that is kept may be back-propagated again
    number, made_in = next(_outputs), backward_at_work()
    if made_in != NO_PASS:
        _collected_by(made_in, owner, finish, made_inside=True)

    def collect(gradient: Tensor) -> None:
        nonlocal seen
        item = reached(gradient)
        if seen:
            return
        seen = True
        now = backward_at_work()
        outer = None if made_in == NO_PASS else _collected.get((made_in, id(owner)))  # unless that pass is over
        if outer is None:
            _collected_by(now, owner, finish).append(((False, 0, number), item))
        else:
            outer.append(((True, -now, number), item))

    output.register_hook(collect)  # type: ignore[no-untyped-call]


def _collected_by(
    number: int, owner: object, finish: Callable[[list[Any]], None], made_inside: bool = False
) -> _Collected:
    """What the pass of this number, which is the current one, has collected for the owner; it will finish it."""
    place = (number, id(owner))
    collected = _collected.get(place)
    if collected is None:
        collected = _collected[place] = _Collected()
        torch.autograd.Variable._execution_engine.queue_callback(partial(_end, finish, collected, made_inside))
    return collected


def _end(finish: Callable[[list[Any]], None], collected: _Collected, made_inside: bool) -> None:
    if made_inside and collected and is_in_backward_of_a_node():
        raise UserError(
            "MHLinear: reentrant checkpoints inside of one another do not tell when the backward pass ends; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    if collected:
        collected.sort(key=itemgetter(0))
        finish([item for _, item in collected])
