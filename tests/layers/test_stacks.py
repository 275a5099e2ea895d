"""Perceptrons and stacks of Memory Heads."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mh_lightning import MHLinear, memory_head_optimizer
from mh_lightning.errors import UserError
from mh_lightning.layers import MLP, StackedMemoryHeads
from mh_lightning.layers.memory_head import PUBLISHED

OPTIONS = {
    "key_mem_units": 6,
    "delta": 2,
    "distance": "euclidean",
    "gamma_alpha": 5.0,
    "upd_m": "WTA",
    "upd_k": "ad_hoc_WTA",
    "beta_k": 0.1,
    "scramble": True,
    "tau_alpha": 0.9,
    "tau_mu": 3,
    "tau_eta": 2,
}


def stack(**options: object) -> StackedMemoryHeads:
    torch.manual_seed(0)
    return StackedMemoryHeads(3, 4, hidden_features=[5, 7], **{**PUBLISHED, **OPTIONS, **options})


def heads(net: nn.Module) -> list[MHLinear]:
    return [module for module in net.modules() if isinstance(module, MHLinear)]


def steps(net: nn.Module, batch: int, count: int = 15) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(batch, 3, generator=generator)
        nn.functional.cross_entropy(net(x), torch.arange(batch) % 4).backward()
        optimizer.step()


def test_mlp_is_linear_tanh_linear() -> None:
    net = MLP(3, 4, hidden_features=[5, 6])
    x = torch.randn(2, 3)
    first, second, last = (module for module in net if isinstance(module, nn.Linear))
    assert torch.equal(net(x), last(torch.tanh(second(torch.tanh(first(x))))))
    assert isinstance(MLP(3, 4, [5], output_layer=MHLinear)[-1], MHLinear)
    for hidden in ([], [0]):
        with pytest.raises(UserError, match="hidden_features"):
            MLP(3, 4, hidden)


def test_each_layer_matches_its_own_input() -> None:
    net = stack()
    x = torch.randn(8, 3)
    expected = x
    for number, layer in enumerate(heads(net)):
        expected = layer(torch.tanh(expected) if number else expected)
    assert torch.equal(net(x), expected)
    assert [layer.K.shape[2] for layer in heads(net)] == [3, 5, 7]


def test_key_input_is_matched_in_every_layer() -> None:
    net = stack(key_input=True).eval()
    assert [layer.K.shape[2] for layer in heads(net)] == [3, 3, 3]
    x = torch.randn(8, 3)
    hidden = x
    for number, layer in enumerate(heads(net)):
        # the same layer on its own, told which units the stack's input selects
        hidden = torch.tanh(hidden) if number else hidden
        with torch.no_grad():
            responses = torch.exp(-torch.cdist(x, layer.K[0]).square() / 3**0.5)
            top, units = responses.topk(2)
            alphas = torch.softmax(5.0 * top, dim=1)
            blended = torch.einsum("bk,bku->bu", alphas, layer.M[0, units]).view(8, -1, hidden.shape[1] + 1)
            hidden = (blended @ torch.cat([hidden, torch.ones(8, 1)], 1).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(net(x), hidden)


def test_a_key_input_moves_the_keys() -> None:
    torch.manual_seed(0)
    layer = MHLinear.published(2, 1, key_features=3, **OPTIONS | {"scramble": False})
    before = layer.K.clone()
    x, key_input = torch.randn(4, 2), torch.randn(4, 3)
    layer(x, key_input).sum().backward()
    winners = torch.cdist(key_input, before[0]).argmin(dim=1)
    moved = (before != layer.K).any(dim=2)[0]
    assert moved.nonzero().flatten().tolist() == sorted(set(winners.tolist()))


@pytest.mark.parametrize("key_input", [None, torch.ones(4, 2), torch.ones(3, 3)])
def test_key_inputs_of_the_wrong_shape(key_input: Tensor | None) -> None:
    layer = MHLinear.published(2, 1, key_features=3)
    with pytest.raises(UserError, match="key_features=3"):
        layer(torch.ones(4, 2), key_input)
    with pytest.raises(UserError, match="set key_features"):
        MHLinear.published(2, 1)(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(UserError, match="key_size=3 \\(key_features\\)"):
        MHLinear.published(2, 1, key_features=3, key_size=2)


@pytest.mark.parametrize("batch", [1, 8])
def test_routed_layers_use_the_units_of_the_first(batch: int) -> None:
    net = stack(route_by_winners=True)
    assert len(heads(net)) == 1
    x = torch.randn(batch, 3)
    hidden, attention = net.first.forward_with_attention(x)
    for layer in net.later:
        hidden = torch.tanh(hidden)
        matrices = layer.M[0, attention.units[:, 0]].view(batch, 2, -1, hidden.shape[1] + 1)
        outputs = (matrices @ torch.cat([hidden, torch.ones(batch, 1)], 1)[:, None, :, None]).squeeze(3)
        hidden = (attention.alphas[:, 0].unsqueeze(2) * outputs).sum(dim=1)
    torch.testing.assert_close(net(x), hidden)
    net(x).sum().backward()
    winners = attention.units[:, 0, 0].unique().tolist()
    for layer in net.later:  # winner takes all, in every layer
        assert layer.M.grad is not None
        assert layer.M.grad[0].abs().sum(dim=1).nonzero().flatten().tolist() == winners


@pytest.mark.parametrize("batch", [1, 4])
def test_units_are_recycled_in_all_routed_layers(batch: int) -> None:
    net = stack(route_by_winners=True)
    copies = []

    def recycle(sets: Tensor, units: Tensor, sources: Tensor, seed: int, wanted: Tensor | None = None) -> None:
        plain(sets, units, sources, seed, wanted)
        copies.append(
            all(torch.equal(layer.M[sets, units], layer.M[sets, sources]) for layer in (net.first, *net.later))
        )

    plain = net.first._recycle_memories
    net.first._recycle_memories = recycle  # type: ignore[method-assign]
    steps(net, batch)
    assert copies and all(copies) and len(copies) == int(net.first.scrambling_count)


@pytest.mark.parametrize("options", [{}, {"key_input": True}, {"route_by_winners": True}])
def test_copies_and_states(options: dict) -> None:
    net = stack(**options)
    steps(net, 4)
    twin, loaded = copy.deepcopy(net), stack(**options)
    loaded.load_state_dict(net.state_dict())
    for one in (net, twin, loaded):
        steps(one, 4)
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]) and torch.equal(value, loaded.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"key_input": True, "route_by_winners": True}, "exclude each other"),
        ({"route_by_winners": True, "shared_keys": False}, "shared_keys=True"),
        ({"route_by_winners": True, "layer_norm": True}, "layer_norm=False"),
    ],
)
def test_contradictory_options(options: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        stack(**options)


def test_only_the_winner_teaches_the_keys_of_a_routed_stack() -> None:
    net = stack(route_by_winners=True, upd_k="grad_WTA", scramble=False)
    x = torch.randn(6, 3)
    _, attention = net.first.forward_with_attention(x)
    assert attention.alphas.requires_grad
    (gradient,) = torch.autograd.grad(attention.alphas[..., 1:].sum(), net.first.K, allow_unused=True)
    assert gradient.abs().max() == 0  # of the losers' weights


def test_only_touched_units_of_routed_layers_are_stepped() -> None:
    net = stack(route_by_winners=True, scramble=False)
    optimizer = memory_head_optimizer(net, torch.optim.Adam, lr=0.1)
    net(torch.randn(1, 3)).sum().backward()
    optimizer.step()  # moments of one unit
    first = {id(layer): layer.M.detach().clone() for layer in net.later}
    other = None
    while other is None:  # a sample that another unit wins
        optimizer.zero_grad()
        x = torch.randn(1, 3)
        net(x).sum().backward()
        touched = net.later[0].M.grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
        other = touched if len(touched) == 1 else None
    optimizer.step()
    for layer in net.later:
        moved = (first[id(layer)] != layer.M).any(dim=2)[0].nonzero().flatten().tolist()
        assert moved == other


def test_any_batch_shape() -> None:
    for options in ({}, {"key_input": True}, {"route_by_winners": True}):
        net, x = stack(**options).eval(), torch.randn(2, 5, 3)
        torch.testing.assert_close(net(x), net(x.view(10, 3)).view(2, 5, 4))
