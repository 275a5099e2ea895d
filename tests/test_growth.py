"""Heads that get more classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.growth import grown
from mh_lightning.heads import KernelMemoryUnits
from mh_lightning.heads.sample_store import SampleStore, bytes_of_origin, bytes_of_sample
from mh_lightning.layers import MLP
from tests.blobs import FEATURES, blobs
from tests.inference.test_export import HEADS

X, Y = blobs(400, 1)
FEW = 4


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_has_grown_is_one_that_knew_all_classes(name: str) -> None:
    torch.manual_seed(0)
    grows, knew = HEADS[name](FEATURES, FEW), HEADS[name](FEATURES, 7)
    early = Y < FEW
    for head in (grows, knew):
        for rows in torch.split(early.nonzero().flatten(), 30):
            head.update(X[rows], Y[rows])
        head(X[:3])
    grows = grown(grows, 7)
    assert not bool(grows.probabilities(X)[:, FEW:].any())
    for head in (grows, knew):
        for rows in torch.split((~early).nonzero().flatten(), 30):
            head.update(X[rows], Y[rows])
    assert torch.equal(grows(X), knew(X)) and torch.equal(grows.probabilities(X), knew.probabilities(X))
    state, other = grows.state_dict(), knew.state_dict()
    assert state.keys() == other.keys()
    for entry, value in other.items():
        assert torch.equal(state[entry], value), entry
    HEADS[name](FEATURES, 7).load_state_dict(state)
    with pytest.raises(UserError, match="num_classes must be at least 7"):
        grown(grows, 6)


def test_samples_that_lose_their_room_are_drawn() -> None:
    n, room = 16, lambda samples: samples * bytes_of_sample(16, 4) + bytes_of_origin(16, 4)
    kept = torch.zeros(300)
    for seed in range(200):
        store = SampleStore(n, room(50), (16, 8, 4))
        store.add(torch.randn(300, n) / 4, torch.arange(300), seed)
        before, labels = store.kept()
        fewer = store.resized(room(30), seed)
        after, left = fewer.kept()
        assert (
            len(fewer) == 30 and int(fewer.seen) == 300 and sum(one.nbytes for one in fewer.buffers()) <= room(30) + 16
        )
        place = {int(label): row for row, label in enumerate(labels)}
        assert torch.equal(after, before[[place[int(label)] for label in left]])
        kept[left] += 1
    # 200 draws of 30 of 300: 20 each, of the 50 first ones and the others alike
    assert 19 < float(kept[:50].mean()) < 21.5 and 19 < float(kept[50:].mean()) < 21


def test_samples_that_still_have_room_stay_and_so_may_their_digits() -> None:
    x, y = torch.randn(40, 16) / 4, torch.arange(40)
    store = SampleStore(16, 2400, (16, 8, 4))
    store.add(x, y, 0)
    assert int(store.bits) == 16
    same, fewer = store.resized(2350, 0), store.resized(1300, 0)
    assert int(same.bits) == 16 and torch.equal(same.kept()[0], store.kept()[0])
    assert int(fewer.bits) == 8 and fewer.kept()[1].tolist() == y.tolist()
    torch.testing.assert_close(fewer.kept()[0].float(), x, atol=0.02, rtol=0)


def test_kernel_units_beyond_their_room_keep_learning() -> None:
    head = KernelMemoryUnits(FEATURES, FEW, max_bytes=900, linear_part=False, seed=0)
    head.update(X[Y < FEW], Y[Y < FEW])
    head.settle()
    larger = grown(head, 7)
    assert len(larger.store) < len(head.store) and larger.num_classes == 7 and head.num_classes == FEW
    larger.update(X[Y >= FEW], Y[Y >= FEW])
    fresh = KernelMemoryUnits(FEATURES, 7, max_bytes=900, linear_part=False, seed=0)
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {
        name: value.shape for name, value in larger.state_dict().items()
    }
    right = (larger(X).argmax(dim=1) == Y).float()
    assert float(right.mean()) > 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(FEATURES, FEW),
        lambda: nn.Linear(FEATURES, FEW, bias=False),
        lambda: MLP(FEATURES, FEW, output_layer=MHLinear),
        lambda: MHLinear(FEATURES, FEW, key_mem_units=6),
        lambda: MHLinear(FEATURES, FEW, key_mem_units=6, layer_norm=True),
        lambda: MHLinear(FEATURES, FEW, key_mem_units=6, shared_keys=False),
        lambda: MHLinear(FEATURES, FEW, key_mem_units=6, shared_keys=False, distance="cosine", upd_k="grad_WTA"),
        lambda: MHLinear.published(FEATURES, FEW, shared_keys=False, bias=False),
    ],
)
def test_layers_keep_what_they_were_and_learn_more(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    head = make()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    rows = Y < FEW
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(X[rows]), Y[rows]).backward()
        optimizer.step()
    larger = grown(head, 7).eval()
    head.eval()
    with torch.no_grad():
        assert larger(X).shape == (400, 7)
        torch.testing.assert_close(larger(X)[:, :FEW], head(X))
        assert torch.equal(larger(X)[:, FEW:].isfinite(), torch.ones(400, 3, dtype=torch.bool))
    larger.train()
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in larger.parameters()]
    nn.functional.cross_entropy(larger(X), Y).backward()
    optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, larger.parameters(), strict=True))
    fresh = type(larger)(FEATURES, 7) if isinstance(head, nn.Linear) else None
    if fresh is not None and head.bias is not None:
        fresh.load_state_dict(larger.state_dict())
    with pytest.raises(UserError, match="num_classes must be at least 4"):
        grown(head, 3)


def test_what_cannot_grow_is_told() -> None:
    with pytest.raises(UserError, match=r"A Tanh cannot grow to 7 classes; register how with"):
        grown(nn.Tanh(), 7)
    stack = MHLinear(3, 2, key_mem_units=2)
    stack.followers.append(stack)
    with pytest.raises(UserError, match="units are recycled with those of others"):
        stack.add_outputs(1)
