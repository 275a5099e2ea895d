"""Stepping touched units only: like an optimizer over units that are parameters of their own."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import MHLinear, memory_head_optimizer
from mh_lightning.cli import resolved_configuration
from mh_lightning.errors import UserError
from tests.products import every_product, products

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adam, all at once": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
}
every_optimizer = pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)


def build(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    given: dict[str, Any] = {"upd_m": "WTA", "upd_k": "ad_hoc_WTA"} | options
    layer = MHLinear.published(5, 3, key_mem_units=9, delta=2, gamma_alpha=5.0, beta_k=0.01, **given)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer)


def batches(steps: int, seed: int = 0, rows: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator))
        for _ in range(steps)
    ]


def train(net: nn.Sequential, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, targets in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), targets).backward()
        optimizer.step()


class ByHand:
    """Every unit is a parameter of its own, which has a gradient only if the unit was touched."""

    def __init__(self, net: nn.Sequential, kind: Any, options: dict[str, Any]) -> None:
        self.layer = net[2]
        self.units = [nn.Parameter(unit.clone()) for unit in self.layer.M.detach().flatten(0, 1)]
        others = [parameter for parameter in net.parameters() if parameter is not self.layer.M]
        self.optimizer = kind([*others, *self.units], **options)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.layer.M.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = self.layer.M.grad.flatten(0, 1)
        for unit, weights, gradient in zip(self.units, self.layer.M.flatten(0, 1), gradients, strict=True):
            unit.copy_(weights)  # the layer recycles units
            unit.grad = gradient if bool(gradient.any()) else None
        self.optimizer.step()
        self.layer.M.copy_(torch.stack(list(self.units)).view_as(self.layer.M))


HEADS: dict[str, dict[str, Any]] = {
    "wta": {"scramble": True, "tau_alpha": 0.9, "tau_mu": 9, "tau_eta": 4},
    "vanilla": {"distance": "euclidean", "upd_m": None},
    "gradient keys": {"upd_k": "grad_WTA"},
    "private keys": {"shared_keys": False},
    "layer norm": {"layer_norm": True},
}


@every_product
@every_optimizer
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_units_are_parameters_of_their_own(
    head: dict[str, Any], kind: Any, options: dict[str, Any], by_unit: bool
) -> None:
    net, reference = build(**head), build(**head)
    with products(by_unit):
        train(net, memory_head_optimizer(net, kind, **options), batches(30))
        train(reference, ByHand(reference, kind, options), batches(30))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert head != HEADS["wta"] or net[2].scrambling_count > 0


@every_product
@every_optimizer
def test_untouched_units_keep_every_bit(kind: Any, options: dict[str, Any], by_unit: bool) -> None:
    net = build()
    optimizer = memory_head_optimizer(net, kind, **options)
    with products(by_unit):
        train(net, optimizer, batches(30))
        before, won_before = net[2].M.detach().clone(), net[2].key_counter.clone()
        train(net, optimizer, batches(3, seed=1, rows=1))
    touched = net[2].key_counter != won_before
    assert 0 < touched.sum() <= 3
    assert torch.equal((before != net[2].M).any(2), touched)


def test_torch_alone_lets_untouched_units_drift() -> None:
    net = build()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    train(net, optimizer, batches(30))
    before, won_before = net[2].M.detach().clone(), net[2].key_counter.clone()
    train(net, optimizer, batches(1, seed=1, rows=1))
    assert (before != net[2].M).any(2).sum() > (net[2].key_counter != won_before).sum() == 1


def test_without_momentum_or_decay_it_is_plain_sgd() -> None:
    net, reference = build(), build()
    with products(by_unit=True):
        train(net, memory_head_optimizer(net, lr=0.1), batches(20))
        train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), batches(20))
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in net.state_dict().items())


@every_product
@every_optimizer
@pytest.mark.parametrize("copied", ["optimizer", "both"])
def test_saved_and_loaded_it_goes_on(
    kind: Any, options: dict[str, Any], by_unit: bool, copied: str, tmp_path: Any
) -> None:
    net = build()
    with products(by_unit):
        optimizer = memory_head_optimizer(net, kind, **options)
        train(net, optimizer, batches(10))
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        other = copy.deepcopy(net) if copied == "optimizer" else build()
        other.load_state_dict(saved["net"])
        resumed = memory_head_optimizer(other, kind, **options)
        resumed.load_state_dict(saved["optimizer"])
        train(net, optimizer, batches(10, seed=1))
        train(other, resumed, batches(10, seed=1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert len(saved["optimizer"]["param_groups"][0]["params"]) == 2 + 9


def test_it_is_an_optimizer_of_its_own_class_on_the_usual_parameters() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, torch.optim.AdamW, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(net, optimizer, batches(2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    scheduler.step()
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, batches(1))
    assert torch.equal(net[2].M, before["2.M"])  # at a learning rate of 0


def test_groups_and_a_factory() -> None:
    net = build()
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    optimizer = memory_head_optimizer(net, make, params=groups, weight_decay=0.1)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, batches(1))
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[2].M, before["2.M"])
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [2, 9]


def test_a_closure_is_called_first() -> None:
    net, reference = build(), build()
    optimizer, (x, targets) = memory_head_optimizer(net, lr=0.1), batches(1)[0]
    train(reference, memory_head_optimizer(reference, lr=0.1), [(x, targets)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), targets)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert torch.equal(net[2].M, reference[2].M)


def test_after_a_failed_closure_it_still_works() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, lr=0.1)

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    before = net[2].M.detach().clone()
    train(net, optimizer, batches(1))
    assert not torch.equal(net[2].M, before)
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 2 + 9


@every_product
def test_accumulated_and_clipped_gradients(by_unit: bool) -> None:
    net, reference = build(), build()
    optimizers: list[Any] = [memory_head_optimizer(net, lr=0.1), ByHand(reference, torch.optim.SGD, {"lr": 0.1})]
    for model, optimizer, sparse in ((net, optimizers[0], by_unit), (reference, optimizers[1], False)):
        with products(by_unit):
            for x, targets in batches(3):
                F.cross_entropy(model(x), targets).backward()
        assert model[2].M.grad.is_sparse == sparse
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
    torch.testing.assert_close(net[2].M, reference[2].M)


def test_gradient_scaler() -> None:
    net, reference = build(), build()
    (x, targets), scaler = batches(1)[0], torch.amp.GradScaler("cpu")
    optimizer = memory_head_optimizer(net, lr=0.1)
    with products(by_unit=True):
        train(reference, memory_head_optimizer(reference, lr=0.1), [(x, targets)])
        scaler.scale(F.cross_entropy(net(x), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(net[2].M, reference[2].M)
        before = net[2].M.detach().clone()
        optimizer.zero_grad()
        (F.cross_entropy(net(x), targets) * torch.inf).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # refuses
    assert torch.equal(net[2].M, before)


def test_after_a_failed_load_it_is_as_before() -> None:
    net, (x, targets) = build(), batches(1)[0]
    optimizer = memory_head_optimizer(net, lr=0.1)
    F.cross_entropy(net(x), targets).backward()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
    optimizer.zero_grad()
    assert net[2].M.grad is None
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    train(net, optimizer, batches(1))


def test_after_a_failed_step_it_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build()
    optimizer = memory_head_optimizer(net, lr=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(net, optimizer, batches(1))
    optimizer.zero_grad()
    assert net[2].M.grad is None


def test_hooks_run_once_before_and_after_loading() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, lr=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(net, optimizer, batches(1))
    optimizer.load_state_dict(optimizer.state_dict())
    train(net, optimizer, batches(1))
    assert len(calls) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(UserError, match="state_dict"):
        copied(memory_head_optimizer(build(), lr=0.1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.LBFGS, {}),
        (torch.optim.SparseAdam, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    ],
)
def test_optimizers_that_cannot_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=kind.__name__):
        memory_head_optimizer(build(), kind, **options)


def test_looking_at_the_state_does_no_harm() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, torch.optim.Adam, lr=0.1)
    train(net, optimizer, batches(2))
    assert not optimizer.state[net[2].M]  # looking makes an entry
    optimizer.load_state_dict(optimizer.state_dict())
    train(net, optimizer, batches(2))


def test_a_head_added_later_is_stepped_by_unit_too() -> None:
    nets = nn.ModuleList([build(), build()])
    optimizer = memory_head_optimizer(nets, params=nets[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": nets[1].parameters()})
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [2 + 9, 2 + 9]


def test_named_parameters_name_units() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, params=net.named_parameters(), lr=0.1)
    (group,) = optimizer.state_dict()["param_groups"]
    names = ["0.weight", "0.bias", "2.M"]
    assert group["param_names"] == [*names[:2], *(f"2.M[0, {unit}]" for unit in range(9))]
    train(net, optimizer, batches(2))
    assert optimizer.param_groups[0]["param_names"] == names
    optimizer.load_state_dict(optimizer.state_dict())


def test_weights_that_moved_are_found() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, lr=0.1)
    train(net, optimizer, batches(3))
    net.double()
    before = net[2].M.detach().clone()
    train(net, optimizer, [(x.double(), targets) for x, targets in batches(3)])
    assert not torch.equal(net[2].M, before)


def test_a_step_is_seen_by_graphs_that_need_the_old_weights() -> None:
    net = build()
    optimizer = memory_head_optimizer(net, lr=0.1)
    x = batches(1)[0][0]
    kept = net(x).sum()
    train(net, optimizer, batches(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_nothing_to_do_without_gradients() -> None:
    net = build()
    before = copy.deepcopy(net.state_dict())
    memory_head_optimizer(net, torch.optim.SGD, lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_without_memory_head_it_is_refused(frozen: bool) -> None:
    net = build()
    if frozen:
        net[2].M.requires_grad_(False)
    with pytest.raises(UserError, match="no Memory Head"):
        memory_head_optimizer(net if frozen else nn.Linear(2, 2))


def test_the_plain_optimizer_keeps_its_name_in_configurations() -> None:
    layer = MHLinear.published(3, 2, key_mem_units=4)
    memory_head_optimizer(layer, torch.optim.SGD, lr=0.1)
    found = resolved_configuration(["--config", "streams/modes_ci.yaml", "--config", "methods/agem_moons.yaml"])
    assert found["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"
