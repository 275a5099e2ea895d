"""Samples that are not finite teach the keys nothing, and count nowhere; what a skipped step has seen, neither."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import MHLinear, memory_head_optimizer
from mh_lightning.layers.auto_scale import AutoScale
from mh_lightning.layers.key_memory import KeyMemory
from tests.products import products

N, O = 4, 3  # noqa: E741
OPTIONS: dict[str, Any] = {
    "key_mem_units": 8, "delta": 2, "gamma_alpha": 5.0, "tau_alpha": 0.9, "tau_mu": 9, "tau_eta": 0, "beta_k": 0.05,
    "scramble": True, "upd_m": "WTA", "upd_k": "ad_hoc_WTA",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "cosine": OPTIONS,
    "dot_scaled": OPTIONS | {"distance": "dot_scaled", "gamma_alpha": "auto"},
    "euclidean": OPTIONS | {"distance": "euclidean", "sigma_eu": "auto"},
    "private keys": OPTIONS | {"distance": "euclidean", "shared_keys": False},
    "gradient keys": OPTIONS | {"upd_k": "grad_WTA"},
    "sign": OPTIONS | {"psi_fn": "sign", "distance": "euclidean"},
    "normalised": OPTIONS | {"normalize_input": True, "distance": "euclidean"},
    "random memories": OPTIONS | {"random_memories": True},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
every_value = pytest.mark.parametrize("value", [math.nan, -math.inf])


def build(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> MHLinear:
    torch.manual_seed(0)
    layer = MHLinear.published(N, O, **options, dtype=dtype)
    torch.manual_seed(1)
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module | dict[str, Tensor]) -> None:
    expected = other if isinstance(other, dict) else other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, expected[name]), name


def batches(rows: int = 4) -> list[Tensor]:
    return list(torch.randn(5, rows, N, generator=torch.Generator().manual_seed(2)))


@every_value
@every_kind
def test_a_bad_row_is_as_none(options: dict[str, Any], value: float) -> None:
    layer = build(options)
    for x in batches():
        bad = torch.cat([x[:2], x[:1], x[2:]])
        bad[2, 1] = value
        layer(bad).sum().backward()
    other = build(options)
    for x in batches():
        other(x).sum().backward()
    assert_same(layer, other)
    assert layer.key_counter.sum() == 20 * len(layer.K) and layer.scrambling_count.sum() > 0


@pytest.mark.parametrize("rows", [1, 3])
@every_value
@every_kind
def test_a_batch_of_bad_rows_changes_nothing(options: dict[str, Any], value: float, rows: int) -> None:
    layer = build(options)
    layer(batches()[0]).sum().backward()
    before = state(layer)
    layer(torch.full((rows, N), value)).sum().backward()
    layer.zero_grad()
    assert_same(layer, before)
    assert layer.eval()(batches()[0]).isfinite().all()


@pytest.mark.parametrize("rows", [1, 3])
@every_kind
def test_rows_whose_gradient_is_not_finite(options: dict[str, Any], rows: int) -> None:
    layer = build(options)
    for x in batches(rows):
        weights = torch.ones(rows, O)
        weights[0, 1] = math.nan
        (layer(x) * weights).sum().backward()
    other = build(options)
    for x in batches(rows):
        other(x[1:]).sum().backward()
    assert_same(layer, other)


@pytest.mark.parametrize("rows", [1, 4])
@every_kind
def test_finite_gradients_whose_sum_is_infinite_count(options: dict[str, Any], rows: int) -> None:
    layer = build(options)
    for x in batches(rows):
        y = layer(x)
        y.backward(torch.full_like(y, 2e38))
    other = build(options)
    for x in batches(rows):
        other(x).sum().backward()
    assert int(layer.key_counter[0].sum()) == 5 * rows
    assert_same(layer, other)


def test_squares_that_overflow() -> None:
    """A finite sample of 1e30 would set the scale to infinity for ever."""
    for rows in (1, 2):
        layer = build(KINDS["euclidean"])
        x = torch.randn(rows, N)
        x[0] = 1e30
        before = state(layer)
        layer(x).sum().backward()
        assert all(value.isfinite().all() for value in layer.state_dict().values())
        assert rows == 2 or all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_separate_key_input() -> None:
    layer, other = (build(OPTIONS | {"key_features": 2, "distance": "euclidean"}) for _ in range(2))
    x, key_input = torch.randn(4, N), torch.randn(4, 2)
    x[1, 0], key_input[2, 0] = math.nan, math.inf
    layer(x, key_input).sum().backward()
    other(x[[0, 3]], key_input[[0, 3]]).sum().backward()
    assert_same(layer, other)


@pytest.mark.parametrize("rows", [1, 4])
def test_deferred(rows: int) -> None:
    layer, other = build(KINDS["euclidean"], torch.float64), build(KINDS["euclidean"], torch.float64)
    layer.defer_key_updates = other.defer_key_updates = True
    for x in (part.double() for part in batches(rows)):
        layer(torch.full_like(x, math.nan)).sum().backward()
        for one in (layer, other):
            one(x).sum().backward()
            one.apply_key_updates()
    for name, found in layer.state_dict().items():
        torch.testing.assert_close(found, other.state_dict()[name], rtol=0, atol=1e-12, msg=name)


@every_value
@pytest.mark.parametrize("scramble", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random memories"])
def test_without_a_look_at_values(kind: str, scramble: bool, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which need not be waited for."""
    options = KINDS[kind] | {"scramble": scramble}
    layer, other = build(options, torch.float64), build(options, torch.float64)
    for x in (part.double() for part in batches()):
        bad = torch.cat([x, torch.full((2, N), value, dtype=x.dtype)])
        with monkeypatch.context() as patch:
            patch.setattr(KeyMemory, "_may_wait_for", lambda *_: False)
            layer(bad).sum().backward()
            layer(bad[4:]).sum().backward()
        other(x).sum().backward()
    for name, found in layer.state_dict().items():
        torch.testing.assert_close(found, other.state_dict()[name], rtol=0, atol=1e-12, msg=name)


def test_the_scale_before_its_first_sample() -> None:
    scale = AutoScale(N, 0.7)
    scale.add(torch.zeros(2, N), torch.zeros(2, dtype=torch.bool))
    assert scale.seen == 0 and scale.squared_distance == torch.tensor(0.7)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_loop_that_skips_bad_steps_recovers(rows: int) -> None:
    """As it does with nn.Linear."""
    for head in (nn.Linear(N, O), build(KINDS["euclidean"])):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        for step in range(40):
            x = torch.randn(rows, N, generator=torch.Generator().manual_seed(step))
            targets = x[:, :O].argmax(1)
            if step % 7 == 0:
                x[0, step % N] = math.nan if step % 2 else math.inf
            optimizer.zero_grad()
            loss = F.cross_entropy(head(x), targets)
            loss.backward()
            if loss.isfinite():
                optimizer.step()
        assert all(value.isfinite().all() for value in head.state_dict().values())


# --- steps that are not taken


def scaled_step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, overflow: bool) -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(layer(x).square().mean()).backward()
    if overflow:  # somewhere else in the net, so that the output's gradient does not show it
        extra.grad = torch.tensor([math.inf])
    scaler.step(optimizer)
    scaler.update()


extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(("fused", "by_unit"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["euclidean", "gradient keys"])
def test_a_step_that_gradient_scaling_skips(kind: str, rows: int, fused: bool, by_unit: bool) -> None:
    layers = [build(KINDS[kind]) for _ in range(2)]
    optimizers = [
        memory_head_optimizer(layer, torch.optim.SGD, params=[*layer.parameters(), extra], lr=0.1, fused=fused)
        for layer in layers
    ]
    with products(by_unit):
        for number, x in enumerate(batches(rows)):
            before = state(layers[0])
            scaled_step(layers[0], optimizers[0], x, overflow=number % 2 == 1)
            if number % 2:
                assert_same(layers[0], before)
            else:
                scaled_step(layers[1], optimizers[1], x, overflow=False)
                assert not torch.equal(layers[0].key_counter, before["key_counter"])
    extra.grad = None
    assert_same(*layers)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_clipping_refuses(set_to_none: bool) -> None:
    layer, x = build(KINDS["euclidean"]), batches()[0]
    optimizer = memory_head_optimizer(layer, lr=0.1)
    layer.sparse_gradients = False
    before = state(layer)
    layer(x).sum().backward()
    extra.grad = torch.tensor([math.inf])
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_([*layer.parameters(), extra], 1.0, error_if_nonfinite=True)
    extra.grad = None
    assert_same(layer, before)
    optimizer.zero_grad(set_to_none)
    optimizer.step()
    assert_same(layer, before)


def test_gradients_dropped_by_the_module_take_the_updates_along() -> None:
    layer, other = build(OPTIONS), build(OPTIONS)
    optimizers = [memory_head_optimizer(one, lr=0.1) for one in (layer, other)]
    layer(batches()[0]).sum().backward()
    layer.zero_grad()
    for one, optimizer in zip((layer, other), optimizers, strict=True):
        one(batches()[1]).sum().backward()
        one(batches()[2]).sum().backward()
        optimizer.step()
    assert_same(layer, other)
    assert layer.key_counter.sum() == 8


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_moves_where_gradients_were_dropped(rows: int, sparse: bool, set_to_none: bool) -> None:
    """As with nn.Linear, whatever has dropped them."""
    with products(by_unit=sparse):
        layer, other = build(OPTIONS), build(OPTIONS)
        optimizers = [memory_head_optimizer(one, lr=0.1) for one in (layer, other)]
        before, (first, second, third, *_) = state(layer), batches(rows)
        layer(first).sum().backward()
        assert rows == 1 or layer.M.grad.is_sparse == sparse
        nn.Sequential(layer).zero_grad(set_to_none)
        optimizers[0].step()
        assert_same(layer, before)
        layer(first).sum().backward()
        layer.zero_grad(set_to_none)  # and on with the next, without a step
        for one, optimizer in zip((layer, other), optimizers, strict=True):
            one(second).sum().backward()
            one(third).sum().backward()
            optimizer.step()
        assert_same(layer, other)
        assert layer.key_counter.sum() == 2 * rows


def test_gradients_that_are_zero_by_themselves_are_not_dropped() -> None:
    """As those of a hinge loss that is content."""
    layer, other = build(OPTIONS), build(OPTIONS)
    optimizer = memory_head_optimizer(layer, lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        (0 * layer(x)).sum().backward()
        optimizer.step()
        (0 * other(x)).sum().backward()
    assert_same(layer, other)
    assert layer.key_counter.sum() == 20


def test_another_optimizer_takes_over() -> None:
    layer = build(OPTIONS)
    kept = memory_head_optimizer(layer, lr=0.1)
    other, twin = torch.optim.SGD(layer.parameters(), lr=0.1), copy.deepcopy(layer)
    twin(batches()[0]).sum().backward()
    assert twin.key_counter.sum() == 4  # no optimizer steps a copy
    layer.sparse_gradients = False
    layer(batches()[0]).sum().backward()
    other.step()
    with pytest.raises(ValueError, match="set defer_key_updates=False before it takes over"):
        layer(batches()[1]).sum().backward()
    layer.defer_key_updates = False
    layer(batches()[1]).sum().backward()
    assert layer.key_counter.sum() == 4
    del kept


def test_a_layer_that_is_deferred_by_hand_is_left_to_it() -> None:
    layer = build(OPTIONS)
    layer.defer_key_updates = True
    optimizer = memory_head_optimizer(layer, lr=0.1)
    layer(batches()[0]).sum().backward()
    optimizer.step()
    assert layer.key_counter.sum() == 0
    optimizer.zero_grad()
    layer.apply_key_updates()
    assert layer.key_counter.sum() == 4
