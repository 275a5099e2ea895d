"""Scales that the layer learns from the stream: the formula, and that they are state like the keys."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.functional import one_sample
from mh_lightning.layers import StackedMemoryHeads
from tests.oracle import Oracle

N, O = 4, 3  # noqa: E741
STEPS = 12
AD_HOC: dict[str, Any] = {
    "key_mem_units": 7, "delta": 2, "gamma_alpha": 5.0, "tau_alpha": 0.6, "tau_mu": 6, "tau_eta": 4, "beta_k": 0.1,
    "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True,
}  # fmt: skip
EUCLIDEAN = AD_HOC | {"distance": "euclidean", "sigma_eu": "auto"}
COSINE = AD_HOC | {"distance": "cosine", "gamma_alpha": "auto", "tau_alpha": 0.49}
DOT_SCALED = AD_HOC | {"distance": "dot_scaled", "gamma_alpha": "auto", "tau_alpha": 1e9}
KINDS = {"euclidean": EUCLIDEAN, "cosine": COSINE, "dot_scaled": DOT_SCALED}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def build(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> MHLinear:
    torch.manual_seed(0)
    return MHLinear.published(N, O, **options, dtype=dtype)


def stream(batch: int, steps: int = STEPS) -> list[Tensor]:
    """Around a centre that moves, and is not the origin."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.linspace(0, 2, steps * batch, dtype=torch.float64).view(steps, batch, 1)
    return list(torch.randn(steps, batch, N, generator=generator, dtype=torch.float64) + 1 + drift)


def learn(layer: MHLinear, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        (layer(x.to(layer.M.dtype)) * torch.arange(1, O + 1)).tanh().mean().backward()
        layer.apply_key_updates()
        optimizer.step()


def state(layer: MHLinear) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def slow_squared_distance(samples: list[list[float]], before: float) -> float:
    """S as its definition reads, over lists."""
    if not samples:
        return before
    centre = [sum(column) / (len(samples) + 100) for column in zip(*samples, strict=True)]
    return 2 * sum(sum((a - b) ** 2 for a, b in zip(z, centre, strict=True)) for z in samples) / len(samples)


@every_kind
@pytest.mark.parametrize("batch", [1, 5])
def test_formula(options: dict[str, Any], batch: int) -> None:
    """Each step is that of a layer with the numbers that the samples before it give by hand."""
    layer, samples = build(options), []
    assert layer.scale is not None
    before = 2.0 if options["distance"] == "cosine" else 2 / 3
    for x in stream(batch):
        s = slow_squared_distance(samples, before)
        by_hand: dict[str, Any] = {"gamma_alpha": 50 * math.sqrt(N) / s}
        if options["distance"] == "euclidean":
            width = s / (10 * math.sqrt(N))
            by_hand = {"sigma_eu": width, "beta_k": options["beta_k"] * math.sqrt(N) * width}
        oracle = Oracle(layer.K, layer.M, N, O, **options | by_hand)
        names = ("mu", "eta", "key_counter", "scrambling_count")
        for name in names:
            setattr(oracle, name, getattr(layer, name).tolist())
        expected, seen = oracle.forward(x)
        y = layer(x)
        y.sum().backward()
        oracle.update(seen)
        assert oracle.margin > 1e-12
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(layer.K, oracle.K)
        for name in names:
            assert torch.equal(getattr(layer, name), oracle.counters()[name]), name
        samples += (F.normalize(x) if options["distance"] == "cosine" else x).tolist()
    assert layer.scale.seen == len(samples) and layer.scrambling_count > 0
    torch.testing.assert_close(layer.scale.squared_distance.item(), slow_squared_distance(samples, before))


def test_becomes_the_mean_squared_distance_of_two_samples() -> None:
    layer, samples = build(EUCLIDEAN), torch.cat(stream(20, steps=100))
    assert layer.scale is not None
    layer.scale.add(samples)
    mean = 2 * torch.pdist(samples).square().sum() / len(samples) ** 2
    torch.testing.assert_close(layer.scale.squared_distance, mean, rtol=0.01, atol=0)
    assert layer.scale.squared_distance > mean


def test_a_first_narrow_cloud_does_not_set_the_scale() -> None:
    layer = build(EUCLIDEAN)
    assert layer.scale is not None
    layer.scale.add(1 + 0.001 * torch.randn(100, N, dtype=torch.float64))
    assert 1 < layer.scale.squared_distance < 4


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("kind", ["euclidean", "dot_scaled"])
def test_the_scale_of_the_inputs_does_not_matter(kind: str, factor: float, batch: int) -> None:
    """With keys and starting point at the same scale, every alpha, winner and count is the same."""
    # a response of dot_scaled itself scales, so that a threshold would not
    options = KINDS[kind] | {"scramble": kind == "euclidean"}
    layer, scaled = build(options), build(options)
    assert layer.scale is not None and scaled.scale is not None
    scaled.K *= factor
    scaled.scale.squared_distance *= factor**2
    for x in stream(batch):
        alphas = [one.forward_with_attention(z)[1].alphas for one, z in ((layer, x), (scaled, factor * x))]
        torch.testing.assert_close(alphas[1], alphas[0])
        for one, z in ((layer, x), (scaled, factor * x)):
            one(z).sum().backward()
        torch.testing.assert_close(scaled.K, factor * layer.K)
    for name in ("mu", "eta", "key_counter", "scrambling_count"):
        assert torch.equal(getattr(scaled, name), getattr(layer, name))
    torch.testing.assert_close(scaled.scale.squared_distance, factor**2 * layer.scale.squared_distance)


@pytest.mark.parametrize("batch", [1, 5])
@every_kind
def test_normalized_inputs(options: dict[str, Any], batch: int) -> None:
    found, expected = build(options | {"normalize_input": True}), build(options)
    learn(found, [7 * x for x in stream(batch)])
    learn(expected, [F.normalize(x) for x in stream(batch)])
    assert_same(state(found), state(expected), atol=1e-12)
    x = torch.randn(2, 3, N, dtype=torch.float64)
    torch.testing.assert_close(found.eval()(x), expected.eval()(F.normalize(x, dim=-1)))


def test_normalized_images_and_key_inputs() -> None:
    images = torch.randn(3, 2, 4, 4)
    by_length = images / images.flatten(1).norm(dim=1).view(3, 1, 1, 1)
    common: dict[str, Any] = {"delta": 2, "psi_fn": "resize2d", "key_size": 18}
    found, expected = (MHLinear.published(32, 3, normalize_input=flag, **common) for flag in (True, False))
    expected.load_state_dict(found.state_dict())
    torch.testing.assert_close(found(images), expected(by_length))
    found, expected = (
        MHLinear.published(5, 3, delta=2, key_features=4, normalize_input=flag) for flag in (True, False)
    )
    expected.load_state_dict(found.state_dict())
    x, key = torch.randn(6, 5), torch.randn(6, 4)
    torch.testing.assert_close(found(x, key), expected(F.normalize(x), F.normalize(key)))


def test_gradients_pass_through_the_normalisation() -> None:
    layer = MHLinear.published(4, 2, delta=2, normalize_input=True, gamma_alpha=3.0, dtype=torch.float64).eval()
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@every_kind
def test_numpy_and_torch_agree(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = build(options), build(options)
    learn(fast, stream(1, steps=40))
    monkeypatch.setattr(one_sample, "MOST_NUMBERS", 0)
    learn(slow, stream(1, steps=40))
    assert_same(state(fast), state(slow), atol=1e-11)
    assert fast.scrambling_count > 0


@every_kind
@pytest.mark.parametrize("copied", ["state", "deepcopy", "pickle", "file"])
def test_goes_on_from_a_copy_in_the_middle(options: dict[str, Any], copied: str) -> None:
    batches, whole = stream(3), build(options)
    learn(whole, batches[:5])
    if copied == "deepcopy":
        half = copy.deepcopy(whole)
    elif copied == "pickle":
        half = pickle.loads(pickle.dumps(whole))
    else:
        saved: Any = whole.state_dict()
        if copied == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        half = MHLinear.published(N, O, **options, dtype=torch.float64)
        half.load_state_dict(saved)
    learn(half, batches[5:])
    learn(whole, batches[5:])
    assert_same(state(half), state(whole))


@every_kind
@pytest.mark.parametrize("batch", [1, 4])
def test_only_back_propagated_training_counts(options: dict[str, Any], batch: int) -> None:
    layer, batches = build(options), stream(batch)
    layer.eval()
    assert layer(batches[0]).isfinite().all()
    learn(layer.train(), batches[:4])
    before = state(layer)
    layer(batches[5])
    with torch.no_grad():
        layer(batches[5])
    layer.eval()
    layer(batches[6]).sum().backward()
    layer.train().M.requires_grad_(False)
    layer(batches[7].clone().requires_grad_()).sum().backward()
    assert_same(state(layer), before)


@every_kind
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_one_batch(options: dict[str, Any], parts: int) -> None:
    whole, accumulated = build(options), build(options)
    accumulated.defer_key_updates = True
    for x in stream(4):
        whole(x).sum().backward()
        for part in x.chunk(parts):
            accumulated(part).sum().backward()
        accumulated.apply_key_updates()
    assert_same(state(accumulated), state(whole), atol=1e-12)


def test_two_forwards_of_one_backward_both_count() -> None:
    layer = build(EUCLIDEAN)
    assert layer.scale is not None
    one, other = stream(3)[:2]
    (layer(one).sum() + layer(other).sum()).backward()
    expected = build(EUCLIDEAN).scale
    assert expected is not None
    expected.add(torch.cat([one, other]))
    torch.testing.assert_close(layer.scale.state_dict(), expected.state_dict())


@every_kind
def test_forgotten_with_the_keys(options: dict[str, Any]) -> None:
    layer = build(options)
    fresh = state(layer)
    learn(layer, stream(2))
    torch.manual_seed(0)
    layer.reset_parameters()
    assert {name: v.tolist() for name, v in layer.state_dict().items() if "scale." in name} == {
        name: v.tolist() for name, v in fresh.items() if "scale." in name
    }


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@every_kind
def test_autocast_leaves_the_state_exact(options: dict[str, Any], lower: torch.dtype) -> None:
    full, mixed = build(options, torch.float32), build(options, torch.float32)
    for x in stream(4):
        full(x.float()).sum().backward()
        with torch.autocast("cpu", dtype=lower):
            y = mixed(x.float())
        y.float().sum().backward()
    assert y.dtype == lower
    assert_same(state(mixed), state(full))


def test_autocast_normalises_inputs_of_either_type() -> None:
    layer = build(EUCLIDEAN | {"normalize_input": True}, torch.float32).eval()
    x = 1000 * stream(4)[0].float()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(given)
        torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.02)


def test_half_precision_layer() -> None:
    layer, full = build(EUCLIDEAN, torch.float32).bfloat16(), build(EUCLIDEAN, torch.float32)
    for one in (layer, full):
        learn(one, stream(16, steps=40))
    assert layer.scale is not None and full.scale is not None
    assert layer.scale.squared_distance.dtype == torch.float32 and layer.scale.seen == 640
    torch.testing.assert_close(layer.scale.squared_distance, full.scale.squared_distance, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("value", [0.0, 2.0])
@every_kind
def test_equal_samples_give_numbers(options: dict[str, Any], value: float, batch: int) -> None:
    layer = build(options, torch.float32)
    learn(layer, [torch.full((batch, N), value)] * 5)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert layer(torch.randn(2, N)).isfinite().all()


def test_there_is_no_state_without_auto() -> None:
    plain = {"K", "M", "mu", "eta", "key_counter", "scrambling_count"}
    assert MHLinear.published(N, O, delta=2).state_dict().keys() == plain
    assert MHLinear.published(N, O, delta=2, sigma_eu="auto").scale is None  # cosine has no width
    with_auto = MHLinear.published(N, O, delta=2, gamma_alpha="auto")
    assert with_auto.state_dict().keys() - plain == {
        "scale.seen", "scale.mean", "scale.variance", "scale.squared_distance"
    }  # fmt: skip
    assert with_auto.reference_state_dict().keys() == {"K", "M"}


def test_euclidean_responses_have_a_range_of_their_own() -> None:
    options: dict[str, Any] = {"delta": 2, "distance": "euclidean", "sigma_eu": 0.5}
    found, expected = (MHLinear.published(N, O, gamma_alpha=gamma, **options) for gamma in ("auto", 25.0))
    expected.load_state_dict(found.state_dict())
    x = torch.randn(5, N)
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize("name", ["sigma_eu", "gamma_alpha"])
def test_other_texts_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"MHLinear: {name} must be .*finite, or be 'auto', got 'automatic'."):
        MHLinear.published(N, O, delta=2, **{name: "automatic"})


def test_stacks_take_the_options() -> None:
    stack = StackedMemoryHeads(N, O, hidden_features=[5], **EUCLIDEAN, normalize_input=True)
    for x in stream(3):
        stack(x.float()).sum().backward()
    for layer in (stack.first, *stack.later):
        assert isinstance(layer, MHLinear) and layer.scale is not None and layer.scale.seen == 3 * STEPS


@pytest.mark.parametrize("options", [EUCLIDEAN | {"normalize_input": True}, COSINE], ids=["euclidean", "cosine"])
def test_exported_program(options: dict[str, Any]) -> None:
    layer = build(options)
    learn(layer, stream(3))
    layer.eval()
    program = torch.export.export(layer, (stream(5)[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 9):
        x = stream(batch)[0]
        torch.testing.assert_close(program.module()(x), layer(x))


def test_compiled() -> None:
    torch.compiler.reset()
    layer, compiled_layer = build(EUCLIDEAN), build(EUCLIDEAN)
    compiled: Callable[[Tensor], Tensor] = torch.compile(compiled_layer, backend="aot_eager")
    for x in stream(3, steps=3):
        layer(x).sum().backward()
        compiled(x).sum().backward()
    torch.compiler.reset()
    assert_same(state(compiled_layer), state(layer), atol=1e-9)


def train_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save([states_of(options, rank, 2) for options in KINDS.values()], f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def states_of(options: dict[str, Any], rank: int, ranks: int) -> list[dict[str, Tensor]]:
    layer, states = build(options), []
    for x in stream(4):
        layer(x.tensor_split(ranks)[rank]).sum().backward()
        states.append(state(layer))
    return states


def test_ranks_learn_one_scale(tmp_path: Path) -> None:
    mp.spawn(train_on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for options, of_first, of_second in zip(KINDS.values(), first, second, strict=True):
        for one, other, alone in zip(of_first, of_second, states_of(options, 0, 1), strict=True):
            assert_same(one, other)
            assert_same(one, alone, atol=1e-9)
