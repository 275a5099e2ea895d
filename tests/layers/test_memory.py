"""What a training step allocates, as torch's profiler records it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from mh_lightning import MHLinear, memory_head_optimizer
from tests.products import every_product, products

WTA: dict[str, Any] = {"upd_m": "WTA", "upd_k": "ad_hoc_WTA"}
FLOAT = 4  # bytes


def peak(work: Callable[[], object]) -> int:
    """Bytes that some work holds at most, beyond what is there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def size(tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return 0
    return FLOAT * (tensor._values() if tensor.is_sparse else tensor).numel()


def test_the_profiler_sees_what_is_held() -> None:
    layer, x, targets = nn.Linear(100, 1000), torch.randn(64, 100), torch.randint(1000, (64,))
    weights, outputs = FLOAT * 101 * 1000, FLOAT * 64 * 1000
    assert outputs <= peak(lambda: layer(x)) <= 1.1 * outputs
    assert weights + outputs <= peak(lambda: F.cross_entropy(layer(x), targets).backward()) <= weights + 3 * outputs


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, memory_head_optimizer])
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "dot_scaled", "euclidean"])
@pytest.mark.parametrize("options", [WTA, {}, {"detach_gradients": False}], ids=["wta", "vanilla", "undetached"])
@pytest.mark.parametrize(
    ("b", "n", "o", "m", "delta"),
    [(1, 128, 20, 50, 2), (8, 192, 5, 10, 1), (128, 192, 3, 10, 2), (128, 192, 50, 10, 2), (64, 192, 20, 100, 2)],
)
@every_product
def test_peak_of_a_step(
    b: int,
    n: int,
    o: int,
    m: int,
    delta: int,
    options: dict[str, Any],
    distance: str,
    input_gradient: bool,
    optimizer: Any,
    by_unit: bool,
) -> None:
    layer = MHLinear.published(n, o, key_mem_units=m, delta=delta, distance=distance, scramble=True, **options)
    made = optimizer(layer.parameters() if optimizer is torch.optim.SGD else layer)
    x, targets = torch.randn(b, n, requires_grad=input_gradient), torch.randint(o, (b,))

    def step() -> None:
        F.cross_entropy(layer(x), targets).backward()
        made.step()

    with products(by_unit):
        step()  # what is made once is made
        made.zero_grad()
        x.grad = None
        without_gradients = peak(lambda: F.cross_entropy(layer(x), targets))
        extra = peak(step) - size(layer.M.grad) - size(layer.K.grad) - size(x.grad)
    assert max(without_gradients, extra) <= 3 * FLOAT * (b * m * o + b * n + m * n)
