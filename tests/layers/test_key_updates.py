"""When the keys and counters of `MHLinear` move: once for each back-propagated training forward, and never else."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.layers import StackedMemoryHeads
from tests.oracle import Oracle

DISTANCES = ["cosine", "dot_scaled", "euclidean"]
INPUTS, OUTPUTS = 5, 3
AD_HOC: dict[str, Any] = {
    "in_features": INPUTS, "out_features": OUTPUTS, "key_mem_units": 6, "delta": 2, "gamma_alpha": 5.0,
    "tau_alpha": 0.45, "tau_mu": 8, "tau_eta": 6, "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "beta_k": 0.05,
    "scramble": True,
}  # fmt: skip
BY_GRADIENT = AD_HOC | {"upd_m": "vanilla", "upd_k": None}
State = dict[str, Tensor]


def build(options: dict[str, Any], seed: int = 0) -> MHLinear:
    torch.manual_seed(seed)
    layer = MHLinear.published(**options, dtype=torch.float64)
    if layer.distance == "cosine" and layer.upd_k != "ad_hoc_WTA":
        with torch.no_grad():
            layer.K.mul_(torch.rand(6, 1, dtype=torch.float64) + 0.5)  # as after an optimizer step
    return layer


def samples(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state(layer: MHLinear) -> State:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_equal(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_close(ours: State, theirs: State) -> None:
    """Integers exactly, the others to 1e-6 (and much better in float64)."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=1e-6 if value.is_floating_point() else 0.0)


def assert_like_oracle(layer: MHLinear, oracle: Oracle) -> None:
    assert oracle.margin > 1e-9
    assert_close(state(layer), {"K": oracle.K.detach(), "M": oracle.M.detach()} | oracle.counters())


every_distance = pytest.mark.parametrize("distance", DISTANCES)
every_update = pytest.mark.parametrize("options", [AD_HOC, BY_GRADIENT], ids=["ad_hoc", "by_gradient"])


@every_distance
@every_update
def test_evaluation_changes_nothing(options: dict[str, Any], distance: str) -> None:
    layer = build(options | {"distance": distance})
    before = state(layer)
    layer.eval()(samples(4, 0).requires_grad_()).sum().backward()
    assert_equal(state(layer), before)
    layer.train()
    with torch.no_grad():
        layer(samples(4, 0))
    with torch.inference_mode():
        layer(samples(4, 0))
    assert_equal(state(layer), before)
    layer(samples(4, 0)).sum().backward()
    assert not torch.equal(state(layer)["key_counter"], before["key_counter"])


@every_distance
@every_update
def test_dropped_forward_leaves_no_trace(options: dict[str, Any], distance: str) -> None:
    layer, other = build(options | {"distance": distance}), build(options | {"distance": distance})
    layer(samples(4, 0))
    assert_equal(state(layer), state(other))
    for one in (layer, other):
        one(samples(3, 1)).sum().backward()
    assert_equal(state(layer), state(other))
    assert layer.key_counter.sum() == 3


@every_distance
@every_update
def test_two_forwards_then_one_backward(options: dict[str, Any], distance: str) -> None:
    options = options | {"distance": distance, "tau_mu": 100, "tau_eta": 0}
    layer = build(options)
    oracle = Oracle(layer.K, layer.M, **options)
    first, second = layer(samples(3, 1)), layer(samples(4, 2))
    seen = [oracle.forward(samples(3, 1))[1], oracle.forward(samples(4, 2))[1]]
    # the last forward comes first in the backward pass, and yet updates last
    (second.sum() + first.sum()).backward()
    for one in seen:
        oracle.update(one)
    assert_like_oracle(layer, oracle)
    assert oracle.scrambling_count == [2]

    swapped = Oracle(build(options).K, layer.M, **options)
    for one in reversed(seen):
        swapped.update(one)
    assert not torch.allclose(swapped.K, oracle.K)


@every_distance
def test_module_used_twice_in_one_forward(distance: str) -> None:
    options = AD_HOC | {"distance": distance, "out_features": INPUTS}
    layer = build(options)
    oracle = Oracle(layer.K, layer.M, **options)
    layer(layer(samples(4, 1))).sum().backward()
    hidden, seen = oracle.forward(samples(4, 1))
    _, seen_again = oracle.forward(hidden)
    oracle.update(seen)
    oracle.update(seen_again)
    assert_like_oracle(layer, oracle)


@every_distance
@every_update
@pytest.mark.parametrize("scramble", [False, True])
@pytest.mark.parametrize("detach_gradients", [False, True])
def test_two_forwards_then_two_backwards(
    options: dict[str, Any], distance: str, scramble: bool, detach_gradients: bool
) -> None:
    """Where x is no graph of its own, nothing that the first pass changes is needed by the second."""
    options = options | {"distance": distance, "scramble": scramble, "detach_gradients": detach_gradients}
    layer = build(options)
    oracle = Oracle(layer.K, layer.M, **options)
    first, second = layer(samples(3, 1)), layer(samples(4, 2))
    seen = [oracle.forward(samples(3, 1))[1], oracle.forward(samples(4, 2))[1]]
    first.sum().backward()
    oracle.update(seen[0])
    second.sum().backward()
    oracle.update(seen[1])
    if not scramble:
        oracle.mu, oracle.eta = layer.mu.tolist(), layer.eta.tolist()
    assert_like_oracle(layer, oracle)


@every_update
def test_failed_backward_does_not_stop_later_updates(options: dict[str, Any]) -> None:
    def fail(_: Tensor) -> None:
        raise KeyboardInterrupt

    layer, other = build(options), build(options)
    x = samples(3, 0).requires_grad_()
    x.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        layer(x).sum().backward()
    assert_equal(state(layer), state(other))
    layer.zero_grad()
    for one in (layer, other):
        one(samples(4, 1)).sum().backward()
    assert other.key_counter.sum() == 4
    assert_equal(state(layer), state(other))


def test_deferral_can_be_switched_off_with_updates_pending() -> None:
    layer = build(AD_HOC)
    layer.defer_key_updates = True
    layer(samples(3, 0)).sum().backward()
    layer.defer_key_updates = False
    layer(samples(4, 1)).sum().backward()
    layer.apply_key_updates()
    assert layer.key_counter.sum() == 4  # dropped, as what was deferred was for a step that never came


@every_distance
@every_update
def test_retained_graph_updates_once(options: dict[str, Any], distance: str) -> None:
    layer, other = build(options | {"distance": distance}), build(options | {"distance": distance})
    # without scrambling, since that changes the memories that a second pass needs
    layer.scramble = other.scramble = False
    y = layer(samples(4, 1))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    other(samples(4, 1)).mul(2).sum().backward()
    assert_equal(state(layer), state(other))
    torch.testing.assert_close(layer.M.grad, other.M.grad)


@every_update
def test_gradient_without_backward_call_updates_once(options: dict[str, Any]) -> None:
    layer, other = build(options), build(options)
    torch.autograd.grad(layer(samples(4, 1)).sum(), layer.M)
    other(samples(4, 1)).sum().backward()
    assert_equal(state(layer), state(other))
    assert layer.key_counter.sum() == 4


@every_update
def test_inplace_operation_on_the_output(options: dict[str, Any]) -> None:
    layer, other = build(options), build(options)
    nn.Sequential(layer, nn.ReLU(inplace=True))(samples(4, 1)).sum().backward()
    nn.Sequential(other, nn.ReLU())(samples(4, 1)).sum().backward()
    assert_equal(state(layer), state(other))
    torch.testing.assert_close(layer.M.grad, other.M.grad)
    assert layer.key_counter.sum() == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_distance
@every_update
def test_activation_checkpointing_updates_once(options: dict[str, Any], distance: str, use_reentrant: bool) -> None:
    plain, checkpointed = build(options | {"distance": distance}), build(options | {"distance": distance})
    for seed in range(6):
        x, same = samples(4, seed).requires_grad_(), samples(4, seed).requires_grad_()
        plain(x).tanh().sum().backward()
        checkpoint(checkpointed, same, use_reentrant=use_reentrant).tanh().sum().backward()
        torch.testing.assert_close(x.grad, same.grad)
        assert_equal(state(checkpointed), state(plain))
    assert plain.scrambling_count > 0 and plain.key_counter.sum() == 24


@pytest.mark.parametrize("scramble", [False, True])
@every_distance
@every_update
@pytest.mark.parametrize("rows", [1, 4])
def test_kept_graph_of_frozen_features_is_passed_again(
    options: dict[str, Any], distance: str, scramble: bool, rows: int
) -> None:
    """Only the graph of an input needs the memories as they were."""
    changed = {"distance": distance, "scramble": scramble, "tau_eta": 0, "tau_alpha": 9.0}
    layer, other = (build(options | changed) for _ in range(2))
    y = layer(samples(rows, 1))
    y.sum().backward(retain_graph=True)
    assert not scramble or layer.scrambling_count == 1
    y.sum().backward()
    (2 * other(samples(rows, 1)).sum()).backward()
    torch.testing.assert_close(layer.M.grad, other.M.grad)
    assert_equal(state(layer), state(other))


@pytest.mark.parametrize("layer_norm", [False, True])
@every_distance
@every_update
def test_kept_graph_of_an_input_after_a_scramble_is_refused(
    options: dict[str, Any], distance: str, layer_norm: bool
) -> None:
    layer = build(options | {"distance": distance, "tau_eta": 0, "layer_norm": layer_norm})
    y = layer(samples(4, 1).requires_grad_())
    y.sum().backward(retain_graph=True)
    assert layer.scrambling_count == 1
    with pytest.raises(UserError, match=r"scramble=True has recycled a unit .* set defer_key_updates=True"):
        y.sum().backward()


@every_distance
@every_update
@pytest.mark.parametrize("detach_gradients", [False, True])
def test_kept_graph_of_an_input_without_a_scramble(
    options: dict[str, Any], distance: str, detach_gradients: bool
) -> None:
    """Though keys have moved; deferred, units may be recycled too."""
    for changed in ({"scramble": False}, {"tau_eta": 0}):
        layer, other = (
            build(options | {"distance": distance, "detach_gradients": detach_gradients} | changed) for _ in range(2)
        )
        layer.defer_key_updates = other.defer_key_updates = layer.scramble
        x, same = samples(4, 1).requires_grad_(), samples(4, 1).requires_grad_()
        y = layer(x)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        (2 * other(same).sum()).backward()
        torch.testing.assert_close(x.grad, same.grad)
        for one in (layer, other):
            if one.scramble:
                one.apply_key_updates()
                assert one.scrambling_count == 1
        assert_equal(state(layer), state(other))


def test_kept_graph_of_a_routed_stack_after_a_scramble_is_refused() -> None:
    options = {name: value for name, value in AD_HOC.items() if not name.endswith("_features")}
    net = StackedMemoryHeads(INPUTS, OUTPUTS, [4], route_by_winners=True, **options | {"tau_eta": 0})
    y = net(samples(4, 1).float())
    y.sum().backward(retain_graph=True)
    with pytest.raises(UserError, match="recycled a unit"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_distance
@every_update
def test_checkpointed_twice_in_one_backward(options: dict[str, Any], distance: str, use_reentrant: bool) -> None:
    """What is computed again in the backward pass sees the keys of the forward."""
    options = options | {"distance": distance, "out_features": INPUTS, "tau_eta": 0, "beta_k": 0.5}
    plain, checkpointed = build(options), build(options)
    for seed in range(3):
        x, same = samples(4, seed).requires_grad_(), samples(4, seed).requires_grad_()
        plain(plain(x).tanh()).square().sum().backward()
        hidden = checkpoint(checkpointed, same, use_reentrant=use_reentrant).tanh()
        checkpoint(checkpointed, hidden, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, same.grad)
        torch.testing.assert_close(checkpointed.M.grad, plain.M.grad)
        assert_equal(state(checkpointed), state(plain))
    assert plain.key_counter.sum() == 24 and plain.scrambling_count > 0


def test_reentrant_checkpoints_inside_of_one_another_are_refused() -> None:
    layer = build(AD_HOC)

    def inner(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(layer, x, use_reentrant=True)
        return y.tanh()

    with pytest.raises(UserError, match="use_reentrant=False"):
        checkpoint(inner, samples(4, 0).requires_grad_(), use_reentrant=True).sum().backward()
    assert layer.key_counter.sum() == 0
    checkpoint(inner, samples(4, 0).requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.key_counter.sum() == 4


# --- tensors that are not the layer's own


def test_functional_call_does_not_move_what_it_has_not_read() -> None:
    layer, x = build(AD_HOC), samples(4, 0)
    given = {name: value.clone().requires_grad_(name == "M") for name, value in state(build(AD_HOC, seed=7)).items()}
    before, unmoved = state(layer), {name: value.detach().clone() for name, value in given.items()}
    with pytest.raises(UserError, match="functional_call"):
        torch.func.functional_call(layer, given, x).sum().backward()
    with pytest.raises(UserError, match="functional_call"):
        torch.func.functional_call(layer, {"M": given["M"]}, x).sum().backward()
    assert_equal(state(layer), before)
    assert_equal(given, unmoved)
    # without scrambling memories stay, and the keys that were read are the layer's own
    layer.scramble = False
    torch.func.functional_call(layer, {"M": given["M"]}, x).sum().backward()
    assert given["M"].grad is not None and layer.M.grad is None and layer.key_counter.sum() == 4
    torch.func.functional_call(layer.eval(), given, x).sum().backward()
    assert layer.key_counter.sum() == 4


class Halved(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values / 2


@pytest.mark.parametrize("rows", [1, 4])
def test_parametrized_memories_and_keys(rows: int) -> None:
    layer = build(AD_HOC | {"tau_eta": 0, "tau_alpha": 9.0})
    parametrize.register_parametrization(layer, "M", Halved())
    before = state(layer)
    with pytest.raises(UserError, match=r"M is parametrized.* scramble=False"):
        layer(samples(rows, 0)).sum().backward()
    layer.scramble = False
    plain = build(AD_HOC | {"scramble": False})
    with torch.no_grad():
        plain.M.copy_(layer.M)
    torch.testing.assert_close(layer(samples(rows, 0)), plain(samples(rows, 0)))
    before = state(layer)
    layer(samples(rows, 1)).sum().backward()
    assert (layer.key_counter - before["key_counter"]).sum() == rows and not torch.equal(layer.K, before["K"])
    keys = build(AD_HOC)
    parametrize.register_parametrization(keys, "K", Halved())
    with pytest.raises(UserError, match="K is parametrized"):
        keys(samples(rows, 0)).sum().backward()


def test_replicas_of_data_parallel_are_refused() -> None:
    replica = build(BY_GRADIENT)._replicate_for_data_parallel()
    replica.K, replica.M = (
        value.detach().clone().requires_grad_() for value in (build(BY_GRADIENT).K, build(AD_HOC).M)
    )
    with pytest.raises(UserError, match="replica"):
        replica(samples(4, 0)).sum().backward()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("training", [False, True])
def test_transforms_of_functions_are_refused(rows: int, training: bool) -> None:
    layer, x = build(AD_HOC).train(training), samples(rows, 0)

    def loss(memories: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"M": memories}, sample.unsqueeze(0)).sum()

    for transformed in (
        lambda: torch.func.grad(loss)(layer.M.detach(), x[0]),
        lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.M.detach(), x),
        lambda: torch.func.vmap(layer)(x.unsqueeze(1)),
        lambda: torch.func.jvp(layer, (x,), (x,)),
    ):
        with pytest.raises(UserError, match=r"transforms of torch\.func .* cannot pass through it"):
            transformed()


# --- updates that wait


def test_loading_and_resetting_drop_what_waits() -> None:
    layer = build(AD_HOC)
    layer.defer_key_updates = True
    saved = copy.deepcopy(layer.state_dict())

    def load() -> None:
        layer.load_state_dict(saved)

    def reset() -> None:
        torch.manual_seed(0)
        layer.reset_parameters()

    for undo in (load, reset, layer.drop_key_updates):
        layer(samples(4, 0)).sum().backward()
        undo()
        before = state(layer)
        layer.apply_key_updates()
        assert_equal(state(layer), before)
    # a part that is not this layer's leaves it as it is
    layer(samples(4, 0)).sum().backward()
    layer.load_state_dict({}, strict=False)
    layer.apply_key_updates()
    assert layer.key_counter.sum() == 4


def test_resumed_between_steps_it_goes_on_as_if_uninterrupted() -> None:
    """As with gradients, what waits for a step that is still to come is taken again from its micro-batches."""
    layer = build(AD_HOC)
    layer.defer_key_updates = True
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def step(layer: MHLinear, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for part in samples(6, seed).split(3):
            layer(part).square().mean().backward()
        layer.apply_key_updates()
        optimizer.step()

    step(layer, optimizer, 0)
    saved = copy.deepcopy(layer.state_dict())
    layer(samples(3, 1)).square().mean().backward()  # of a step that is not finished
    assert_equal(state(layer), saved)
    resumed = build(AD_HOC, seed=5)
    resumed.load_state_dict(saved)
    layer.load_state_dict(saved)
    for one in (layer, resumed):
        one.defer_key_updates = True
        for seed in (1, 2):
            step(one, torch.optim.SGD(one.parameters(), lr=0.1), seed)
    assert_equal(state(layer), state(resumed))


def train(layer: MHLinear, steps: int, seed: int = 10) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        layer(samples(4, seed + step)).tanh().sum().backward()
        optimizer.step()


def by_pickle(layer: MHLinear) -> MHLinear:
    twin: MHLinear = pickle.loads(pickle.dumps(layer))
    return twin


def by_state_dict(layer: MHLinear) -> MHLinear:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    options = BY_GRADIENT if isinstance(layer.K, nn.Parameter) else AD_HOC
    twin = build(options | {"distance": layer.distance}, seed=99)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


every_copy = pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_state_dict])


@every_copy
@every_update
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_copy_at_any_moment(options: dict[str, Any], distance: str, copied: Callable[[MHLinear], MHLinear]) -> None:
    layer = build(options | {"distance": distance})
    expected = [state(layer)]
    fresh = copied(layer)
    train(layer, steps=3)
    after_training, layer_after_training = copied(layer), state(layer)
    layer.zero_grad()
    y = layer(samples(4, 0))
    between = copied(layer)
    y.sum().backward()
    after_backward = copied(layer)
    expected += [layer_after_training, layer_after_training, state(layer)]
    assert not torch.equal(expected[2]["key_counter"], expected[3]["key_counter"])
    twins = [fresh, after_training, between, after_backward]
    for twin, wanted in zip(twins, expected, strict=True):
        assert_equal(state(twin), wanted)

    # copies learn like the original, and leave it alone
    layer.zero_grad()
    after_backward.zero_grad()
    untouched = state(layer)
    train(after_backward, steps=3, seed=20)
    assert_equal(state(layer), untouched)
    train(layer, steps=3, seed=20)
    assert_equal(state(layer), state(after_backward))
    assert layer.scrambling_count > 0


@every_copy
def test_copy_with_pending_updates(copied: Callable[[MHLinear], MHLinear]) -> None:
    layer = build(AD_HOC)
    layer.defer_key_updates = True
    before = state(layer)
    layer(samples(4, 0)).sum().backward()
    assert_equal(state(layer), before)
    twin = copied(layer)
    assert_equal(state(twin), before)
    layer.apply_key_updates()
    assert layer.key_counter.sum() == 4
    assert_equal(state(twin), before)
    twin.apply_key_updates()
    assert_equal(state(twin), before if copied is by_state_dict else state(layer))


@every_distance
@every_update
@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulation_is_one_large_batch(
    options: dict[str, Any], distance: str, shared_keys: bool, micro_batch: int
) -> None:
    options = options | {"distance": distance, "shared_keys": shared_keys}
    whole, parts = build(options), build(options)
    parts.defer_key_updates = True
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (whole, parts)]
    for step in range(8):
        x = samples(3 * micro_batch, step)
        whole(x).square().mean().backward()
        before = state(parts)
        for part in x.split(micro_batch):
            (parts(part).square().mean() / 3).backward()
        assert_equal(state(parts), before)
        parts.apply_key_updates()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_close(state(parts), state(whole))
    assert whole.scrambling_count.min() > 1


def test_apply_without_pending_changes_nothing() -> None:
    layer = build(AD_HOC | {"tau_eta": 0})
    layer.defer_key_updates = True
    before = state(layer)
    layer.apply_key_updates()
    layer(samples(4, 0)).sum().backward()
    layer.apply_key_updates()
    once = state(layer)
    layer.apply_key_updates()
    assert_equal(state(layer), once)
    assert once["key_counter"].sum() == 4 and before["key_counter"].sum() == 0


def test_frozen_memories_freeze_keys_and_counters() -> None:
    layer = MHLinear.published(4, 2, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_alpha=2.0)
    layer.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.requires_grad_(True)
    layer(torch.randn(3, 4)).sum().backward()
    assert not torch.equal(layer.K, before["K"])


def test_assigned_counters_of_the_published_code_become_integers() -> None:
    layer = MHLinear.published(4, 2, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True)
    layer(torch.randn(3, 4)).sum().backward()
    other = MHLinear.published(4, 2, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True)
    other.load_state_dict(layer.reference_state_dict(), assign=True)
    for name in ("mu", "eta", "key_counter", "scrambling_count"):
        assert getattr(other, name).dtype == torch.long
        assert torch.equal(getattr(other, name), getattr(layer, name))
