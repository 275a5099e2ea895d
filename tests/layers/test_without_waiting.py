"""A training step that looks at no value, so that nothing waits for a GPU, and a graph of it can be captured."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning import MHLinear
from mh_lightning.layers import MLP
from mh_lightning.layers.key_memory import KeyMemory

N, O, STEPS = 12, 5, 40  # noqa: E741
RECYCLING: dict[str, Any] = {"key_mem_units": 9, "delta": 3, "tau_alpha": 0.95, "tau_mu": 9, "tau_eta": 5}
KINDS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "cosine": {"distance": "cosine", "gamma_alpha": 5.0},
    "products": {"distance": "dot_scaled"},
    "private keys": {"shared_keys": False},
    "gradient keys": {"distance": "cosine", "gamma_alpha": 5.0, "upd_k": "grad_WTA"},
    "all memories learn": {"upd_m": "vanilla"},
    "normalised": {"layer_norm": True, "normalize_input": True},
    "no recycling": {"scramble": False},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def layer_of(options: dict[str, Any], **more: Any) -> MHLinear:
    torch.manual_seed(0)
    return MHLinear(N, O, **RECYCLING | options, **more)


def learn(layer: MHLinear, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        optimizer.step()


def batches(rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, N, generator=generator, dtype=torch.float64), torch.arange(rows) % O)
            for _ in range(STEPS)]  # fmt: skip


@every_kind
@pytest.mark.parametrize("rows", [2, 8])
def test_masks_give_what_looking_gives(options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = layer_of(options, dtype=torch.float64)
    learn(looking, batches(rows))
    masked = layer_of(options, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(KeyMemory, "_may_wait_for", lambda *_: False)
        learn(masked, batches(rows))
    assert bool(looking.scrambling_count.sum()) == options.get("scramble", True)
    for name, value in looking.state_dict().items():
        assert torch.equal(value, masked.state_dict()[name]), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "normalised"])
def test_no_value_is_looked_at(kind: str) -> None:
    """Tensors of the meta device have none: whoever asks for one gets an error. A layer with `layer_norm` has to look,
    since its graph needs the memories.
    """
    layer = layer_of(KINDS[kind], device="meta")
    learn(layer, [(torch.empty(8, N, device="meta"), torch.empty(8, dtype=torch.long, device="meta"))] * 3)
    assert layer.M.grad is not None and layer.M.grad.is_meta


def test_large_sizes_look_at_no_value_either() -> None:
    """Where distances are products, and units could be grouped."""
    layer = MHLinear(768, 10, device="meta")
    x, y = torch.empty(512, 768, device="meta"), torch.empty(512, dtype=torch.long, device="meta")
    learn(layer, [(x, y)] * 2)


def test_a_head_of_a_net_that_is_trained_looks_at_no_value_without_recycling() -> None:
    with torch.device("meta"):
        net = MLP(N, O, (7,), output_layer=lambda n, o: MHLinear(n, o, **RECYCLING, scramble=False))
        F.cross_entropy(net(torch.empty(8, N)), torch.empty(8, dtype=torch.long)).backward()


def test_a_graph_that_needs_the_memories_waits() -> None:
    layer = layer_of({}, device="meta")
    x = torch.empty(8, N, device="meta", requires_grad=True)
    with pytest.raises(RuntimeError, match="meta"):
        layer(x).sum().backward()


def test_a_graph_is_not_passed_again_after_its_units_were_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often they were is known on the device only; it is asked when an update came in between."""
    monkeypatch.setattr(KeyMemory, "_may_wait_for", lambda *_: False)
    layer = layer_of({"layer_norm": True}, dtype=torch.float64)
    for x, _ in batches(8):
        before = int(layer.scrambling_count)
        first, second = layer(x), layer(x)
        first.sum().backward()
        if int(layer.scrambling_count) > before:
            with pytest.raises((RuntimeError, ValueError), match=r"recycled|modified by an inplace"):
                second.sum().backward()
            return
    raise AssertionError("no unit was recycled")
