"""The memory of a large gradient is used again, and never while somebody has it."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning import MHLinear
from mh_lightning.functional import gradient_memory
from mh_lightning.functional.gradient_memory import memory_of

SIZES: dict[str, Any] = {"dense": {"key_mem_units": 6}, "grouped": {"key_mem_units": 60}}
WIDTH, CLASSES, BATCH = 900, 60, 4


def layer_of(kind: str) -> MHLinear:
    torch.manual_seed(0)
    return MHLinear(WIDTH, CLASSES, delta=2, scramble=False, **SIZES[kind])


def backward(layer: MHLinear, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(BATCH, WIDTH, generator=generator), torch.arange(BATCH)
    F.cross_entropy(layer(x), y).backward()


def alone(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The gradient of a new layer, in new memory."""
    with monkeypatch.context() as without:
        without.setattr(gradient_memory, "SMALLEST", 2**60)
        layer = layer_of(kind)
        backward(layer, seed)
    assert layer.M.grad is not None
    return layer.M.grad


@pytest.mark.parametrize("kind", SIZES)
def test_gradients_in_used_memory_are_those_in_new_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind)
    assert memory_of(layer.M) is not None
    places = set()
    for seed in range(4):
        layer.load_state_dict(layer_of(kind).state_dict())
        layer.zero_grad()
        backward(layer, seed)
        assert layer.M.grad is not None
        places.add(layer.M.grad.data_ptr())
        assert torch.equal(layer.M.grad, alone(kind, seed, monkeypatch))
        layer.M.grad.fill_(torch.nan)  # whatever an optimizer or clipping leaves there
    assert len(places) == 1


@pytest.mark.parametrize("kind", SIZES)
def test_a_gradient_that_somebody_keeps_stays(kind: str) -> None:
    layer = layer_of(kind)
    backward(layer, 0)
    assert layer.M.grad is not None
    kept, before = layer.M.grad.detach()[0, :2], layer.M.grad.clone()
    layer.zero_grad()
    backward(layer, 1)
    assert torch.equal(kept, before[0, :2])
    assert not torch.equal(layer.M.grad, before)


@pytest.mark.parametrize("kind", SIZES)
def test_gradients_add_up(kind: str) -> None:
    layer = layer_of(kind)
    separate = []
    for seed in (0, 1):
        layer.load_state_dict(layer_of(kind).state_dict())
        backward(layer, seed)
        assert layer.M.grad is not None
        separate.append(layer.M.grad.clone())
        layer.zero_grad()
    for _ in range(2):
        layer.zero_grad()
        for seed in (0, 1):
            layer.load_state_dict(layer_of(kind).state_dict())
            backward(layer, seed)
        torch.testing.assert_close(layer.M.grad, separate[0] + separate[1])


def test_copies_have_memory_of_their_own_and_nothing_is_kept_of_a_layer_that_is_gone() -> None:
    layer = layer_of("grouped")
    backward(layer, 0)
    other = copy.deepcopy(layer)
    assert memory_of(other.M) is not memory_of(layer.M)
    places = {id(layer.M), id(other.M)}
    assert places <= gradient_memory._memories.keys()
    del layer, other
    gc.collect()
    assert places.isdisjoint(gradient_memory._memories)


def test_small_and_other_gradients_are_left_alone() -> None:
    assert memory_of(MHLinear(3, 2).M) is None
    assert memory_of(layer_of("dense").M * 1) is None
    assert memory_of(MHLinear(WIDTH, CLASSES, device="meta").M) is None
