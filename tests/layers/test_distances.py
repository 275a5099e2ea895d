"""Squared distances keep their digits, wherever the keys lie."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mh_lightning import functional
from mh_lightning.functional import distances

WIDTH = 0.5


@pytest.fixture(autouse=True)
def _by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small."""
    monkeypatch.setitem(distances.DIRECT, "cpu", 0)


def exact(z: Tensor, keys: Tensor) -> Tensor:
    """In float64, from the differences (b, q, m)."""
    return (z.double()[:, None, None] - keys.double()).square().sum(3)


def spread_out(far: float, sets: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z, keys = 0.8 * torch.rand(200, 24) - 0.4, 0.8 * torch.rand(sets, 50, 24) - 0.4
    keys[:, 7] = far
    return z, keys


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("far", [1e2, 1e4, 1e8, 1e16])
def test_a_far_key_takes_no_digits(far: float, sets: int) -> None:
    z, keys = spread_out(far, sets)
    wanted = exact(z, keys)
    found = functional.match(z, keys, "euclidean", WIDTH)
    assert torch.equal(found.argmax(2), wanted.argmin(2))
    torch.testing.assert_close(
        found.double(), torch.exp(wanted / (-math.sqrt(24) * WIDTH)), rtol=1e-4 if far > 1e2 else 2e-3, atol=0
    )


def test_clusters_far_apart() -> None:
    """No centre serves them all."""
    z, keys = spread_out(0.0)
    centres = torch.tensor([0.0, 1e3, -2e5])
    z, keys = z + centres[torch.arange(200) % 3, None], keys + centres[torch.arange(50) % 3, None]
    assert torch.equal(functional.match(z, keys, "euclidean", WIDTH).argmax(2), exact(z, keys).argmin(2))


def test_keys_that_almost_tie() -> None:
    z, keys = spread_out(0.1)
    keys[0, 8] = keys[0, 7] + 3e-7
    keys[0, 9] = keys[0, 7] - 3e-7
    z = keys[0, 7] + 0.05 * z
    found, wanted = functional.match(z, keys, "euclidean", 1e-2).argmax(2), exact(z, keys)
    nearest, second = wanted.topk(2, largest=False).values.unbind(2)
    told_apart = (second - nearest) / nearest > 1e-6  # the digits of one number
    assert told_apart.sum() > 50 and torch.equal(found[told_apart], wanted.argmin(2)[told_apart])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [0.0, 1e5, 1e9])
def test_gradients(far: float, dtype: torch.dtype) -> None:
    given = [part.to(dtype).requires_grad_() for part in spread_out(far)]
    wide = [part.detach().double().requires_grad_() for part in given]
    weights = torch.randn(200, 1, 50, dtype=torch.float64)
    functional.match(*given, "euclidean", WIDTH).backward(weights.to(dtype))
    torch.exp(exact(*wide) / (-math.sqrt(24) * WIDTH)).backward(weights)
    for one, other in zip(given, wide, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-5)


def test_recorded_graphs_keep_them_too() -> None:
    z, keys = spread_out(1e4)
    matched = torch.compile(functional.match, backend="eager", fullgraph=True)(z, keys, "euclidean", WIDTH)
    assert torch.equal(matched.argmax(2), exact(z, keys).argmin(2))
    torch.compiler.reset()


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize("far", [0.0, 1e4, 1e12])
def test_no_temporary_of_all_differences(far: float) -> None:
    z, keys = spread_out(far)
    with Largest() as largest:
        functional.match(z, keys, "euclidean", WIDTH)
    assert 0 < largest.numbers <= 200 * 50


def test_only_what_needs_it_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    z, keys = spread_out(0.1)
    z[5] = keys[0, 11]  # no digit of a distance of 0 is right
    rows: list[int] = []
    plain = distances._expanded

    def counted(z: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(z))
        return plain(z, keys)

    monkeypatch.setattr(distances, "_expanded", counted)
    found = functional.match(z, keys, "euclidean", WIDTH)
    assert rows == [200, 1] and found[5, 0, 11] == 1
