"""The NumPy way for one sample and torch's way give the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mh_lightning import MHLinear
from mh_lightning.functional import one_sample
from tests.layers.test_reference_vectors import FILES, Case, case, compare_with_recording  # noqa: F401


@contextmanager
def torch_only() -> Iterator[None]:
    before, one_sample.MOST_NUMBERS = one_sample.MOST_NUMBERS, 0
    try:
        yield
    finally:
        one_sample.MOST_NUMBERS = before


def test_reference_vectors_of_one_sample_pass_in_torch_too(case: Case) -> None:  # noqa: F811
    with torch_only():
        compare_with_recording(case)


OPTIONS: list[dict[str, Any]] = [
    {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True, "distance": distance, "delta": delta, "bias": bias}
    for distance in ("euclidean", "cosine", "dot_scaled")
    for delta, bias in ((1, True), (3, False))
]
OPTIONS += [
    {"upd_m": "vanilla", "upd_k": "ad_hoc_WTA", "scramble": True, "distance": "euclidean", "delta": 2},
    {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True, "random_memories": True, "delta": 2},
    {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", "delta": 2},
    {"upd_m": "WTA", "upd_k": "grad_WTA", "delta": 2},
    {"upd_k": "grad_not_WTA", "scramble": True, "delta": 2, "distance": "dot_scaled"},
]


def trained(options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], MHLinear]:
    torch.manual_seed(0)
    layer = MHLinear.published(
        4, 3, key_mem_units=7, gamma_alpha=5.0, tau_alpha=0.8, tau_mu=6, tau_eta=4, beta_k=0.1, dtype=dtype, **options
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(40):
        x = torch.randn(1, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        y = layer(x)
        optimizer.zero_grad()
        (y * torch.arange(1, 4)).sum().backward()
        optimizer.step()
        assert x.grad is not None
        seen += [y.detach(), x.grad]
    return seen, layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forty_samples(options: dict[str, Any]) -> None:
    with torch_only():
        expected, slow = trained(options, torch.float64)
    found, fast = trained(options, torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    for name, value in slow.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0, atol=1e-11)
    if options.get("scramble"):
        assert slow.scrambling_count.sum() > 0


def test_float32() -> None:
    options = OPTIONS[0]
    with torch_only():
        expected, _ = trained(options, torch.float32)
    for one, other in zip(trained(options, torch.float32)[0], expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    layer = MHLinear.published(4, 3, key_mem_units=5, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")
    x = torch.randn(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_the_vectors_are_of_one_sample_too() -> None:
    assert sum("b1" in file.stem for file in FILES) >= 5


def test_an_output_can_be_changed_in_place() -> None:
    net = torch.nn.Sequential(
        MHLinear.published(4, 3, **OPTIONS[0]), torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 2)
    )
    net(torch.randn(1, 4)).sum().backward()
    assert net[0].M.grad is not None


@pytest.mark.parametrize("batch", [1, 2])
def test_deferred_updates_do_not_follow_a_buffer_that_is_filled_again(batch: int) -> None:
    def keys(reuse: bool) -> Tensor:
        torch.manual_seed(0)
        layer = MHLinear.published(4, 3, key_mem_units=5, beta_k=0.1, **OPTIONS[0])
        layer.defer_key_updates = True
        buffer, generator = torch.empty(batch, 4), torch.Generator().manual_seed(1)
        for _ in range(2):
            x = torch.randn(batch, 4, generator=generator)
            layer(buffer.copy_(x) if reuse else x).sum().backward()
        layer.apply_key_updates()
        return layer.K

    assert torch.equal(keys(reuse=True), keys(reuse=False))
