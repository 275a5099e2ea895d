"""`MHLinear` against the oracle, and what it promises about gradients, precision, shapes, size and options."""

import copy
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from tests.oracle import Oracle
from tests.products import every_product, products

DISTANCES = ["cosine", "dot_scaled", "euclidean"]
UPDATES = [
    (None, None),
    ("vanilla", "grad_not_WTA"),
    ("vanilla", "grad_WTA"),
    (None, "ad_hoc_WTA"),
    ("WTA", "ad_hoc_WTA"),
    ("WTA", "grad_WTA"),
]
CLOSE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}
every_distance = pytest.mark.parametrize("distance", DISTANCES)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    layer_norm = draw(st.booleans())
    in_features = draw(st.integers(3 if layer_norm else 2, 5))
    psi_fn = draw(st.sampled_from(["identity", "identity", "resize1d", "sign"]))
    upd_m, upd_k = draw(st.sampled_from(UPDATES))
    key_mem_units = draw(st.integers(1, 5))
    return {
        "in_features": in_features,
        "out_features": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "shared_keys": draw(st.booleans()),
        "key_mem_units": key_mem_units,
        "psi_fn": psi_fn,
        "key_size": draw(st.integers(2, 7)) if psi_fn == "resize1d" else None,
        "layer_norm": layer_norm,
        "delta": draw(st.integers(1, key_mem_units)),
        "gamma_alpha": draw(st.sampled_from([0.1, 1.0, 25.0])),
        "tau_alpha": draw(st.sampled_from([-0.111, 0.333, 0.951])),
        "tau_mu": draw(st.integers(1, 6)),
        "tau_eta": draw(st.integers(0, 6)),
        "upd_m": upd_m,
        "upd_k": upd_k,
        "beta_k": draw(st.sampled_from([0.01, 0.7])),
        "scramble": draw(st.booleans()),
        "detach_gradients": draw(st.booleans()),
        "distance": draw(st.sampled_from(DISTANCES)),
        "sigma_eu": draw(st.sampled_from([0.5, 1.0, 3.0])),
    }


def compare_with_oracle(options: dict[str, Any], batch: int, steps: int, seed: int) -> Oracle:
    """Train both on the same stream, and compare everything at each step, until two units tie."""
    torch.manual_seed(seed)
    layer = MHLinear.published(**options, dtype=torch.float64)
    oracle = Oracle(layer.K, layer.M, **options)
    optimizers = [torch.optim.SGD(both.parameters(), lr=0.1) for both in (layer, oracle)]
    for step in range(steps):
        x = torch.randn(batch, options["in_features"], dtype=torch.float64)
        weights = torch.randn(batch, options["out_features"], dtype=torch.float64)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(ours)
        expected, seen = oracle.forward(theirs)
        (y.tanh() * weights).sum().backward()
        (expected.tanh() * weights).sum().backward()
        oracle.update(seen)
        if oracle.margin < 1e-9:
            hypothesis.event(f"tie at step {step}")
            break
        torch.testing.assert_close(y, expected, **CLOSE)
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
        for parameter, reference in zip((layer.M, layer.K), (oracle.M, oracle.K), strict=True):
            torch.testing.assert_close(parameter.grad, reference.grad, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(layer.M.detach(), oracle.M.detach(), **CLOSE)
        torch.testing.assert_close(layer.K.detach(), oracle.K.detach(), **CLOSE)
        counters = oracle.counters()
        if not options["scramble"]:
            counters |= {"mu": torch.zeros_like(layer.mu), "eta": torch.full_like(layer.eta, options["tau_eta"])}
        for name, counts in counters.items():
            assert torch.equal(getattr(layer, name), counts), name
    return oracle


@every_product
@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(configurations(), st.integers(1, 5), st.integers(0, 2**16))
def test_like_the_oracle(by_unit: bool, options: dict[str, Any], batch: int, seed: int) -> None:
    with products(by_unit):
        oracle = compare_with_oracle(options, batch, steps=4, seed=seed)
    hypothesis.event("scrambled" if sum(oracle.scrambling_count) else "never scrambled")


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(("upd_m", "upd_k"), [("WTA", "ad_hoc_WTA"), ("WTA", "grad_WTA"), (None, None)])
@every_distance
def test_like_the_oracle_while_scrambling(
    distance: str, upd_m: str | None, upd_k: str | None, batch: int, shared_keys: bool
) -> None:
    options: dict[str, Any] = {
        "in_features": 4, "out_features": 2, "key_mem_units": 6, "delta": 2, "gamma_alpha": 5.0, "tau_alpha": 0.45,
        "tau_mu": 4, "tau_eta": 3, "beta_k": 0.05, "scramble": True, "distance": distance, "upd_m": upd_m,
        "upd_k": upd_k, "shared_keys": shared_keys,
    }  # fmt: skip
    oracle = compare_with_oracle(options, batch, steps=12, seed=5)
    assert oracle.margin > 1e-9
    assert min(oracle.scrambling_count) >= 2
    assert max(max(count) for count in oracle.mu) > 0


@every_product
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shared_keys", [True, False])
@every_distance
def test_vanilla_gradients_are_derivatives(distance: str, shared_keys: bool, layer_norm: bool, by_unit: bool) -> None:
    torch.manual_seed(2)
    layer = MHLinear.published(4, 2, key_mem_units=3, delta=2, gamma_alpha=3.0, distance=distance,
            shared_keys=shared_keys,
                     layer_norm=layer_norm, detach_gradients=False, dtype=torch.float64).eval()  # fmt: skip

    def outputs(x: Tensor, memories: Tensor, keys: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"M": memories, "K": keys}, x)

    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    # with cosine, keys are normalised outside of the graph: not a derivative, by definition (the oracle checks it)
    keys = layer.K.detach().requires_grad_(distance != "cosine")
    with products(by_unit):
        assert torch.autograd.gradcheck(outputs, (x, layer.M.detach().requires_grad_(), keys))


@pytest.mark.parametrize("layer_norm", [False, True])
@every_distance
def test_second_derivatives_are_right_or_refused(distance: str, layer_norm: bool) -> None:
    options: dict[str, Any] = {"in_features": 4, "out_features": 2, "key_mem_units": 3, "delta": 2, "gamma_alpha": 3.0,
               "distance": distance, "layer_norm": layer_norm, "detach_gradients": False}  # fmt: skip
    torch.manual_seed(2)
    layer = MHLinear.published(**options, dtype=torch.float64).eval()
    oracle = Oracle(layer.K, layer.M, **options)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def second(outputs: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = second(oracle.forward(x)[0])
    try:
        found = second(layer(x))
    except RuntimeError:
        return
    torch.testing.assert_close(found, expected, **CLOSE)


@every_product
@pytest.mark.parametrize("upd_k", ["ad_hoc_WTA", "grad_WTA"])
def test_only_the_winner_learns(upd_k: str, by_unit: bool) -> None:
    layer = MHLinear.published(4, 2, key_mem_units=5, delta=3, upd_m="WTA", upd_k=upd_k)
    with products(by_unit):
        (gradient,) = torch.autograd.grad(layer(torch.randn(1, 4)).sum(), layer.M)
    assert torch.equal(gradient.any(2), layer.key_counter == 1)


def test_match_is_detached_from_the_input_by_default() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    gradients = {}
    for detach_gradients in (True, False):
        torch.manual_seed(1)
        layer = MHLinear.published(4, 2, key_mem_units=3, delta=2, gamma_alpha=5.0, distance="dot_scaled",
                         detach_gradients=detach_gradients)  # fmt: skip
        ours = x.clone().requires_grad_()
        (gradients[detach_gradients],) = torch.autograd.grad(layer(ours).sum(), ours)
    assert not torch.allclose(gradients[True], gradients[False])


def scrambling_layer(random_memories: bool) -> tuple[MHLinear, MHLinear]:
    """A layer after one step that recycled a unit, and before."""
    torch.manual_seed(3)
    layers = [
        MHLinear.published(200, 20, key_mem_units=4, delta=2, tau_alpha=1e9, upd_m="WTA", upd_k="ad_hoc_WTA",
                 scramble=True, random_memories=random_memories) for _ in range(2)
    ]  # fmt: skip
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 200)
    torch.manual_seed(1)
    layers[0](x).sum().backward()
    return layers[0], layers[1]


def test_random_memories_are_fresh() -> None:
    layer, before = scrambling_layer(random_memories=True)
    changed = (layer.M != before.M).any(2)[0]
    assert layer.scrambling_count.item() == changed.sum().item() == 1
    fresh, bound = layer.M[0, changed], 1 / math.sqrt(layer.M.shape[2])
    assert fresh.abs().max() <= bound
    assert abs(fresh.mean()) < 0.05 * bound
    assert abs(fresh.std() / bound - 1 / math.sqrt(3)) < 0.02
    again, _ = scrambling_layer(random_memories=True)
    assert torch.equal(again.M, layer.M)


def test_random_memories_change_nothing_else() -> None:
    (fresh, _), (copied, before) = scrambling_layer(random_memories=True), scrambling_layer(random_memories=False)
    recycled = (fresh.M != copied.M).any(2)[0]
    assert recycled.sum() == 1
    assert torch.equal(fresh.M[0, ~recycled], before.M[0, ~recycled])
    assert (before.M[0, ~recycled] == copied.M[0, recycled]).all(1).any()
    for name in ("K", "mu", "eta", "key_counter", "scrambling_count"):
        assert torch.equal(getattr(fresh, name), getattr(copied, name))


@every_distance
def test_start(distance: str) -> None:
    layer = MHLinear.published(
        9, 4, key_mem_units=50, delta=2, tau_eta=7, distance=distance, upd_m="WTA", upd_k="ad_hoc_WTA"
    )
    assert layer.M.shape == (1, 50, 40) and layer.M.abs().max() <= 1 / math.sqrt(40) < 1.1 * layer.M.abs().max()
    if distance == "cosine":
        torch.testing.assert_close(layer.K.norm(dim=2), torch.ones(1, 50))
    else:
        assert layer.K.abs().max() <= 1 / 3 < 1.1 * layer.K.abs().max()
    assert not layer.mu.any() and not layer.key_counter.any() and not layer.scrambling_count.any()
    assert (layer.eta == 7).all()
    assert not isinstance(layer.K, nn.Parameter) and isinstance(MHLinear.published(9, 4, delta=2).K, nn.Parameter)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 3, 20)),
        ({"bias": False}, (1, 3, 16)),
        ({"shared_keys": False}, (4, 3, 5)),
        ({"layer_norm": True}, (1, 3, 28)),
        ({"shared_keys": False, "bias": False, "layer_norm": True}, (4, 3, 12)),
    ],
)
def test_unit_size(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert MHLinear.published(4, 4, key_mem_units=3, **options).M.shape == shape


@every_product
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@every_distance
def test_autocast_agrees_and_leaves_keys_and_counters_exact(
    distance: str, lower: torch.dtype, backward_inside: bool, by_unit: bool
) -> None:
    with products(by_unit):
        compare_with_autocast(distance, lower, backward_inside)


def compare_with_autocast(distance: str, lower: torch.dtype, backward_inside: bool) -> None:
    torch.manual_seed(0)
    # a product of n terms, a mean and the roundings of inputs and weights: a few units in the last place
    close = 4 * torch.finfo(lower).eps
    options: dict[str, Any] = {
        "key_mem_units": 8, "delta": 2, "gamma_alpha": 5.0, "tau_alpha": 0.4, "tau_mu": 9, "tau_eta": 5,
        "beta_k": 0.05, "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True, "distance": distance,
    }  # fmt: skip
    full, mixed = MHLinear.published(6, 3, **options), MHLinear.published(6, 3, **options)
    mixed.load_state_dict(full.state_dict())
    for _ in range(20):
        x = torch.randn(7, 6)
        expected = full(x)
        expected.square().mean().backward()
        with torch.autocast("cpu", dtype=lower):
            y = mixed(x)
        with torch.autocast("cpu", dtype=lower, enabled=backward_inside):
            y.float().square().mean().backward()
        assert y.dtype == lower
        torch.testing.assert_close(y.float(), expected, rtol=close, atol=close)
        torch.testing.assert_close(mixed.M.grad, full.M.grad, rtol=4 * close, atol=close)
        for name in ("K", "mu", "eta", "key_counter", "scrambling_count"):
            assert torch.equal(getattr(mixed, name), getattr(full, name)), name
    assert mixed.K.dtype == torch.float32
    assert full.scrambling_count > 1


def test_half_precision_layer_counts_every_sample() -> None:
    layer = MHLinear.published(6, 3, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, dtype=torch.bfloat16)
    for _ in range(40):
        layer(torch.randn(16, 6, dtype=torch.bfloat16)).sum().backward()
    assert layer.key_counter.sum() == 640 and layer.K.dtype == torch.float32 and layer.M.dtype == torch.bfloat16


@pytest.mark.parametrize("made", ["cast", "option", "loaded"])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@every_distance
def test_keys_of_a_half_precision_layer_move_as_in_float32(distance: str, lower: torch.dtype, made: str) -> None:
    options: dict[str, Any] = {
        "key_mem_units": 4, "delta": 2, "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "beta_k": 1e-4, "distance": distance,
    }  # fmt: skip
    torch.manual_seed(0)
    full = MHLinear.published(6, 3, **options)
    half = copy.deepcopy(full).to(lower) if made == "cast" else MHLinear.published(6, 3, dtype=lower, **options)
    assert half.M.dtype == lower
    half.load_state_dict(full.state_dict(), assign=made == "loaded")
    half.M.data = half.M.data.to(lower)
    start, samples = full.K.clone(), torch.randn(300, 2, 6).to(lower)
    for x in samples:
        full(x.float()).sum().backward()
        half(x).float().sum().backward()
    moved, wanted = (half.K - start).norm(), (full.K - start).norm()
    assert half.K.dtype == torch.float32 and wanted > 1e-3
    torch.testing.assert_close(moved, wanted, rtol=0.01, atol=0)
    torch.testing.assert_close(half.K, full.K, rtol=0, atol=0.01 * float(wanted))


def test_state_of_half_precision_layers() -> None:
    """What older versions and the published code have saved is read; what is given back loads anywhere."""
    for upd_k in ("ad_hoc_WTA", "grad_WTA"):
        layer = MHLinear.published(
            6, 3, delta=2, upd_m="WTA", upd_k=upd_k, scramble=True, distance="euclidean", sigma_eu="auto"
        )
        layer(torch.randn(4, 6)).sum().backward()
        kept = layer.K.detach().clone()
        half = copy.deepcopy(layer).half()
        assert torch.equal(half.K, kept) and isinstance(half.K, nn.Parameter) == (upd_k == "grad_WTA")
        assert half.K.grad is None or half.K.grad.dtype == torch.float32
        assert half.scale is not None and layer.scale is not None
        for name, value in layer.scale.state_dict().items():
            assert torch.equal(half.scale.state_dict()[name], value), name
        assert torch.equal(half.double().half().float().K, kept)
        assert torch.equal(half.reference_state_dict()["K"], kept)
        old = {name: value.half() if value.is_floating_point() else value for name, value in layer.state_dict().items()}
        for assign in (False, True):
            other = copy.deepcopy(layer)
            other.load_state_dict(old, assign=assign)
            assert other.K.dtype == torch.float32 and torch.equal(other.K, kept.half().float())
        again = MHLinear.published(
            6, 3, delta=2, upd_m="WTA", upd_k=upd_k, scramble=True, distance="euclidean", sigma_eu="auto"
        )
        again.half().load_state_dict(half.half().state_dict())
        assert torch.equal(again.K, kept)
        again.to("meta")


@pytest.mark.parametrize("shape", [(4,), (1, 4), (5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_leading_dimensions(shape: tuple[int, ...], shared_keys: bool) -> None:
    layer, x = MHLinear.published(4, 3, delta=2, shared_keys=shared_keys), torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 3)
    torch.testing.assert_close(y.reshape(-1, 3), layer(x.reshape(-1, 4)))
    y.sum().backward()
    assert layer.key_counter.sum() == x.numel() // 4 * layer.K.shape[0]


def test_images_are_flattened() -> None:
    layer, x = MHLinear.published(24, 3, delta=2), torch.randn(5, 2, 4, 3)
    torch.testing.assert_close(layer(x), layer(x.flatten(1)))


@every_product
def test_empty_batch_changes_nothing(by_unit: bool) -> None:
    layer = MHLinear.published(4, 3, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_eta=0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with products(by_unit):
        layer(torch.randn(0, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_wrong_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"float64.*float32"):
        MHLinear.published(4, 3, delta=2)(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 5), (5,), (), (3, 4, 2)])
def test_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="in_features=4"):
        MHLinear.published(4, 3, delta=2)(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_features": 0}, "in_features"),
        ({"out_features": 0}, "out_features"),
        ({"key_mem_units": 0}, "key_mem_units"),
        ({"delta": 0}, "delta"),
        ({"key_size": 0, "psi_fn": "resize1d"}, "key_size"),
        ({"key_size": 5}, "key_size"),
        ({"key_size": 5, "psi_fn": "sign"}, "key_size"),
        ({"sigma_eu": 0.0}, "sigma_eu"),
        ({"psi_fn": "resize3d"}, "psi_fn"),
        ({"distance": "manhattan"}, "distance"),
        ({"upd_m": "wta"}, "upd_m"),
        ({"upd_k": "WTA"}, "upd_k"),
        ({"upd_m": "WTA"}, "upd_k"),
        ({"upd_m": "WTA", "upd_k": "grad_not_WTA"}, "upd_k"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        MHLinear.published(**{"in_features": 4, "out_features": 3, "delta": 2} | options)


def test_too_large_delta_is_clamped() -> None:
    with pytest.warns(UserWarning, match="delta=5"):
        layer = MHLinear.published(4, 3, key_mem_units=2, delta=5)
    assert layer.delta == 2
    assert layer(torch.randn(3, 4)).shape == (3, 3)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.shape, self.operations = 0, torch.Size(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.operations += 1
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor) and result.numel() > self.size:
                self.size, self.shape = result.numel(), result.shape
        return results


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("upd_k", ["ad_hoc_WTA", "grad_WTA"])
@every_product
def test_no_weights_for_each_sample(upd_k: str, layer_norm: bool, shared_keys: bool, by_unit: bool) -> None:
    b, n, o, m, delta = 64, 32, 16, 16, 2
    layer = MHLinear.published(n, o, key_mem_units=m, delta=delta, upd_m="WTA", upd_k=upd_k, scramble=True, tau_eta=0,
                     layer_norm=layer_norm, shared_keys=shared_keys)  # fmt: skip
    q, _, u = layer.M.shape
    x = torch.randn(b, n, requires_grad=True)
    with products(by_unit), LargestTensor() as largest:
        layer(x).sum().backward()
    assert layer.scrambling_count.sum() > 0 and largest.operations > 50
    assert largest.size < b * q * delta * u, largest.shape


@pytest.mark.parametrize("batch", [1, 32])
def test_published_example_learns(batch: int) -> None:
    torch.manual_seed(0)
    d, c = 2, 4
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    targets = torch.randint(c, (320,))
    x = centres[targets] + 0.1 * torch.randn(320, d)
    head = MHLinear.published(in_features=10, out_features=c, bias=True, key_mem_units=10, upd_m="WTA",
                    upd_k="ad_hoc_WTA",
                    beta_k=0.01, gamma_alpha=25.0, tau_alpha=0.95, tau_mu=50, tau_eta=50, scramble=True, delta=2,
                    distance="euclidean")  # fmt: skip
    net = nn.Sequential(nn.Linear(d, 10), nn.Tanh(), head)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(1 if batch == 1 else 20):
        for images, labels in zip(x.split(batch), targets.split(batch), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    fifth = len(losses) // 5
    assert sum(losses[-fifth:]) < 0.5 * sum(losses[:fifth])
    assert head.key_counter.sum() == 320 * (1 if batch == 1 else 20)
    assert (net(x).argmax(1) == targets).float().mean() > 0.9
