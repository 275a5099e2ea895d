"""Two processes train like one: one spawn runs every case, since starting processes is what takes time."""

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mh_lightning import MHLinear, memory_head_optimizer
from mh_lightning.distributed import gather_rows, world_size
from tests.products import products

RANKS, STEPS, INPUTS, OUTPUTS = 2, 10, 5, 3
State = dict[str, Tensor]


class Case(NamedTuple):
    """How a layer trains: each rank's rows a step, and the micro-batches that they come in."""

    options: dict[str, Any]
    rows: tuple[int, int] = (4, 4)
    micro_batches: int = 1

    def build(self) -> tuple[nn.Sequential, MHLinear]:
        common: dict[str, Any] = {
            "key_mem_units": 6,
            "delta": 2,
            "gamma_alpha": 5.0,
            "tau_mu": 8,
            "tau_eta": 6,
            "beta_k": 0.05,
        }
        torch.manual_seed(0)
        layer = MHLinear(INPUTS, OUTPUTS, **common | self.options)
        return nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), layer).double(), layer

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = sum(self.rows)
        x = torch.randn(rows, INPUTS, dtype=torch.float64, generator=generator)
        return x, torch.randn(rows, OUTPUTS, dtype=torch.float64, generator=generator)


AD_HOC: dict[str, Any] = {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True, "tau_alpha": 0.9}
BY_GRADIENT: dict[str, Any] = {"upd_k": "grad_not_WTA", "scramble": True, "tau_alpha": 0.2}
CASES = {
    "cosine": Case(AD_HOC | {"distance": "cosine"}),
    "euclidean": Case(AD_HOC | {"distance": "euclidean"}),
    "dot_scaled": Case(AD_HOC | {"distance": "dot_scaled"}),
    "one row a rank": Case(AD_HOC | {"distance": "cosine"}, rows=(1, 1)),
    "private keys": Case(AD_HOC | {"distance": "euclidean", "shared_keys": False}),
    "random memories": Case(AD_HOC | {"random_memories": True}),
    "no scrambling": Case(AD_HOC | {"scramble": False}),
    "gradient keys": Case(BY_GRADIENT | {"distance": "dot_scaled"}),
    "gradient keys, cosine": Case(BY_GRADIENT | {"distance": "cosine"}),
    "winner's gradient keys": Case(BY_GRADIENT | {"upd_m": "WTA", "upd_k": "grad_WTA"}),
    "accumulated": Case(AD_HOC | {"distance": "euclidean"}, micro_batches=2),
}
UNEVEN = {
    "uneven": Case(AD_HOC | {"distance": "cosine"}, rows=(3, 1)),
    "random memories, none on the first rank": Case(AD_HOC | {"random_memories": True}, rows=(0, 3)),
    "none on the last rank": Case(AD_HOC | {"distance": "euclidean", "shared_keys": False}, rows=(3, 0)),
}


def train(case: Case, rank: int, ranks: int) -> list[State]:
    """The state after every step, on this rank's share of the data, or on all of it with one rank."""
    net, layer = case.build()
    layer.defer_key_updates = case.micro_batches > 1
    model = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    states = []
    for step in range(STEPS):
        x, weights = (part.tensor_split(ranks)[rank] for part in case.batch(step))
        chunks = [chunk.chunk(case.micro_batches if ranks > 1 else 1) for chunk in (x, weights)]
        for inputs, factors in zip(*chunks, strict=True):
            ((model(inputs).tanh() * factors).sum() / len(x)).backward()
        layer.apply_key_updates()
        optimizer.step()
        optimizer.zero_grad()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    return states


def train_without_optimizer(case: Case, rank: int, ranks: int) -> list[State]:
    """As `train`, with batches of different sizes: only what the layer itself changes."""
    _, layer = case.build()
    torch.manual_seed(100)
    states = []
    for step in range(STEPS):
        x, _ = case.batch(step)
        layer(x.split(list(case.rows))[rank] if ranks > 1 else x).sum().backward()
        states.append({name: value.clone() for name, value in layer.state_dict().items()})
    return states


def gathered(rank: int) -> dict[str, Any]:
    big = 2**53 - 1
    floats = torch.arange(6.0).view(2, 3) / 7 + rank
    return {
        "size": world_size(),
        "even": gather_rows(floats, torch.tensor([big, rank]), torch.tensor([[[True]], [[rank == 1]]])),
        "uneven": gather_rows(torch.full((1 + 2 * rank, 2), float(rank))),
        "first empty": gather_rows(torch.full((3 * rank, 1), 7, dtype=torch.int32)),
        "last empty": gather_rows(torch.full((3 * (1 - rank), 1), 7.0, dtype=torch.float64)),
        "all empty": gather_rows(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timeout=timedelta(seconds=60), rank=rank, world_size=RANKS
    )
    results: dict[str, Any] = {"gathered": gathered(rank)}
    results |= {name: train(case, rank, RANKS) for name, case in CASES.items()}
    results |= {name: train_without_optimizer(case, rank, RANKS) for name, case in UNEVEN.items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_like_one_process(ranks: list[list[State]], alone: list[State]) -> None:
    for step, (first, second, expected) in enumerate(zip(*ranks, alone, strict=True)):
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), f"ranks differ in {name} after step {step}"
            tolerance = 1e-6 if value.is_floating_point() else 0.0
            torch.testing.assert_close(first[name], value, rtol=0.0, atol=tolerance)


def of_layer(states: list[State], name: str) -> Tensor:
    return next(value for key, value in states[-1].items() if key.endswith(name))


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_like_one_process(name: str, results: list[dict[str, Any]]) -> None:
    alone = train(CASES[name], rank=0, ranks=1)
    assert_like_one_process([result[name] for result in results], alone)
    key_sets = of_layer(alone, "K").shape[0]
    assert of_layer(alone, "key_counter").sum() == STEPS * sum(CASES[name].rows) * key_sets
    if CASES[name].options["scramble"]:
        assert of_layer(alone, "scrambling_count").min() >= 1


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_ranks_update_like_one_process(name: str, results: list[dict[str, Any]]) -> None:
    alone = train_without_optimizer(UNEVEN[name], rank=0, ranks=1)
    assert_like_one_process([result[name] for result in results], alone)
    assert of_layer(alone, "scrambling_count").min() >= 1


def test_gather_rows(results: list[dict[str, Any]]) -> None:
    for found in (result["gathered"] for result in results):
        assert found["size"] == RANKS
        floats = torch.arange(6.0).view(2, 3) / 7
        expected = (
            torch.cat([floats, floats + 1]),
            torch.tensor([2**53 - 1, 0, 2**53 - 1, 1]),
            torch.tensor([True, False, True, True]).view(4, 1, 1),
        )
        for tensor, wanted in zip(found["even"], expected, strict=True):
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
        assert found["uneven"][0].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        for name, dtype in (("first empty", torch.int32), ("last empty", torch.float64)):
            assert found[name][0].tolist() == [[7]] * 3 and found[name][0].dtype == dtype
        assert [tuple(tensor.shape) for tensor in found["all empty"]] == [(0, 4), (0,)]


def test_a_process_group_of_one_takes_sparse_gradients_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer = MHLinear(6, 3, key_mem_units=8, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")
        model, before = DistributedDataParallel(layer), layer.M.detach().clone()
        optimizer = memory_head_optimizer(model, lr=0.1)
        with products(by_unit=True):
            model(torch.randn(1, 6)).sum().backward()
        optimizer.step()
        assert (before != layer.M).any(2).sum() == 1
    finally:
        dist.destroy_process_group()


def test_without_process_group() -> None:
    rows, more = torch.randn(3, 2), torch.arange(3)
    assert world_size() == 1
    assert gather_rows(rows, more) == (rows, more)
