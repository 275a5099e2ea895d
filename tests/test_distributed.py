"""Several processes train a layer like one: one start of two, and one of four, runs every case, since starting
processes is what takes time.
"""

import copy
import itertools
import os
import pickle
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mh_lightning import MHLinear, memory_head_optimizer
from mh_lightning.distributed import gather_in_turn, gather_rows, world_size
from mh_lightning.errors import UserError
from tests.fits import on_ranks
from tests.products import products

RANKS = (2, pytest.param(4, marks=pytest.mark.slow))
INPUTS, OUTPUTS = 5, 3
State = dict[str, Tensor]


class Case(NamedTuple):
    """How a layer trains: its options, the rows of all ranks in each step, each step's micro-batches, and in how many
    optimizer steps keys are updated once.
    """

    options: dict[str, Any]
    rows: tuple[int, ...] = (8, 5, 8, 3, 1, 8, 6)  # on four ranks, some have none
    micro_batches: int = 1
    steps_of_keys: int = 1
    autocast: bool = False

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
        layer = MHLinear.published(INPUTS, OUTPUTS, **common | self.options)
        if self.autocast:  # what is matched must not depend on weights that were rounded to bfloat16
            return nn.Sequential(layer), layer
        return nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), layer).double(), layer

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        dtype = torch.float32 if self.autocast else torch.float64
        x = torch.randn(self.rows[step], INPUTS, dtype=dtype, generator=generator)
        # on an empty rank, or on all but one, there is no sample of some class
        return x, torch.randint(OUTPUTS, (self.rows[step],), generator=generator)


SCRAMBLE: dict[str, Any] = {"scramble": True, "tau_alpha": 0.9}
RULES = (("WTA", "ad_hoc_WTA"), ("vanilla", "ad_hoc_WTA"), ("WTA", "grad_WTA"), ("vanilla", "grad_not_WTA"))
AD_HOC: dict[str, Any] = {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", **SCRAMBLE}
BY_GRADIENT: dict[str, Any] = {"upd_k": "grad_not_WTA", **SCRAMBLE}
CASES = {
    f"{distance}, {upd_m}, {upd_k}, {'shared' if shared else 'private'} keys": Case(
        {"distance": distance, "upd_m": upd_m, "upd_k": upd_k, "shared_keys": shared} | SCRAMBLE
    )
    for distance, (upd_m, upd_k), shared in itertools.product(
        ("cosine", "euclidean", "dot_scaled"), RULES, (True, False)
    )
} | {
    "one row a rank, or none": Case(AD_HOC, rows=(2, 4, 1, 4, 3, 2, 4, 1)),
    "random memories": Case(AD_HOC | {"random_memories": True}),
    "no scrambling": Case(AD_HOC | {"scramble": False}),
    "automatic scale": Case(AD_HOC | {"distance": "euclidean", "sigma_eu": "auto"}),
    "normalised layer": Case(AD_HOC | {"layer_norm": True}),
    "accumulated": Case(AD_HOC | {"distance": "euclidean"}, micro_batches=2),
    "accumulated, gradient keys": Case(BY_GRADIENT, micro_batches=3),
    "keys every other step": Case(AD_HOC | {"distance": "euclidean"}, steps_of_keys=2),
    "bfloat16": Case(AD_HOC | {"distance": "euclidean"}, autocast=True),
    "bfloat16, cosine": Case(AD_HOC | {"random_memories": True}, autocast=True),
}


def train(case: Case, rank: int, ranks: int) -> list[State]:
    """The state after every step, on this rank's share of the data, or on all of it with one rank; and the step's loss
    and number of correct predictions, over all ranks.
    """
    net, layer = case.build()
    layer.defer_key_updates = case.micro_batches > 1 or case.steps_of_keys > 1
    model: Any = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    states = []
    for step, rows in enumerate(case.rows):
        found = torch.zeros(2, dtype=torch.float64)
        micro_batches = list(zip(*(part.tensor_split(case.micro_batches) for part in case.batch(step)), strict=True))
        for number, whole in enumerate(micro_batches):
            x, targets = (part[rank::ranks] for part in whole)
            waits = ranks > 1 and number + 1 < len(micro_batches)
            with model.no_sync() if waits else nullcontext(), torch.autocast("cpu", enabled=case.autocast):
                logits = model(x)
                losses = nn.functional.cross_entropy(
                    logits.float() if case.autocast else logits, targets, reduction="sum"
                )
                (losses * ranks / rows).backward()
            found += torch.stack([losses.detach().double() / rows, (logits.argmax(dim=1) == targets).sum().double()])
        if (step + 1) % case.steps_of_keys == 0:
            layer.apply_key_updates()
        optimizer.step()
        optimizer.zero_grad()
        if ranks > 1:
            dist.all_reduce(found)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        states.append(state | {"loss": found[0], "hits": found[1].long()})
    return states


# --- what ranks exchange


def gathered(rank: int, ranks: int) -> dict[str, Any]:
    big = 2**63 - 1
    floats = torch.arange(6.0).view(2, 3) / 7 + rank
    return {
        "size": world_size(),
        "even": gather_rows(floats, torch.tensor([big, rank]), torch.tensor([[[True]], [[rank == 1]]])),
        "uneven": gather_rows(torch.full((1 + 2 * (rank % 2), 2), float(rank))),
        "first empty": gather_rows(torch.full((3 * (rank == 1), 1), 7, dtype=torch.int32)),
        "bfloat16": gather_rows(torch.full((3 * (rank == 0), 1), 7.0, dtype=torch.bfloat16)),
        "all empty": gather_rows(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
        "in turn": [gather_in_turn(torch.arange(rows)[rank::ranks])[0].tolist() for rows in (7, 1, 0, 4, 9)],
    }


@contextmanager
def counted(sizes: list[int]) -> Any:
    """Notes the bytes that this rank sends in each collective; there are no others than these."""

    def note(original: Any, place: int) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            sizes.append(args[place].numel() * args[place].element_size())
            return original(*args, **kwargs)

        return noted

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, place in (("all_gather", 1), ("all_reduce", 0), ("broadcast", 0), ("all_gather_object", 1)):
            patch.setattr(dist, name, note(getattr(dist, name), place))
        yield


def bytes_of_updates(rank: int, ranks: int) -> dict[str, list[int]]:
    """The bytes that a layer sends in updates from 4, 2, 1, 5 and 3 rows on rank 0, and as many or fewer on others."""
    found = {}
    for name, options in (
        ("plain", AD_HOC),
        ("private, random", AD_HOC | {"shared_keys": False, "random_memories": True}),
    ):
        layer, sizes = MHLinear.published(INPUTS, OUTPUTS, key_mem_units=6, **options), []
        with counted(sizes):
            for rows in (4, 2, 1, 5, 3):
                layer(torch.randn(rows * (rank == 0) + rows // 2 * (rank > 0), INPUTS)).sum().backward()
            # whatever object a rank goes on with, all agree on the room
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                (twin if rank == 0 else layer)(torch.randn(1, INPUTS)).sum().backward()
        found[name] = [*sizes, layer.bytes_sent(0), layer.bytes_sent(1), layer.bytes_sent(4), layer.bytes_sent(5)]
    return found


def bad_rows(rank: int, ranks: int) -> State:
    """The state after steps in which a rank has rows that are not finite, or no others."""
    torch.manual_seed(0)
    layer = MHLinear.published(
        INPUTS, OUTPUTS, key_mem_units=6, tau_eta=0, distance="euclidean", sigma_eu="auto", **AD_HOC
    )
    layer.double()
    for step in range(4):
        x = torch.randn(12, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x[step :: ranks if ranks > 1 else RANKS[0], step % INPUTS] = torch.inf
        layer(x[rank::ranks]).sum().backward()
    return {name: value for name, value in layer.state_dict().items() if name != "M"}


def joining_is_refused(rank: int) -> list[str]:
    """With more batches on one rank than on the others."""
    layer = MHLinear.published(INPUTS, OUTPUTS, key_mem_units=6, **AD_HOC)
    model = DistributedDataParallel(layer)

    def uneven() -> None:
        with Join([model]):
            for _ in range(1 + 2 * (rank == 0)):
                model(torch.randn(2, INPUTS)).sum().backward()

    with pytest.raises(UserError) as refused:
        uneven()
    return [str(refused.value)]


def shards_are_refused() -> list[str]:
    layer = MHLinear.published(INPUTS, OUTPUTS, **AD_HOC)
    net = FullyShardedDataParallel(nn.Sequential(layer), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(UserError) as refused:
        net(torch.randn(2, INPUTS)).sum().backward()
    return [str(refused.value)]


def work(rank: int, folder: Path) -> dict[str, Any]:
    ranks = int(folder.name)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timeout=timedelta(seconds=60), rank=rank, world_size=ranks
    )
    found: dict[str, Any] = {"gathered": gathered(rank, ranks), "bytes": bytes_of_updates(rank, ranks)}
    found |= {name: train(case, rank, ranks) for name, case in CASES.items()}
    found |= {"bad rows": bad_rows(rank, ranks), "joining": joining_is_refused(rank)}
    return found | {"refused": shards_are_refused()}


@pytest.fixture(scope="module", params=RANKS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder: Path = tmp_path_factory.mktemp("ranks") / str(request.param)
    folder.mkdir()
    return on_ranks(request.param, work, folder)


def of_layer(states: list[State], name: str) -> Tensor:
    return next(value for key, value in states[-1].items() if key.endswith(name))


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_like_one_process(name: str, results: list[dict[str, Any]]) -> None:
    case = CASES[name]
    alone, by_rank = train(case, rank=0, ranks=1), [result[name] for result in results]
    largest: dict[str, float] = {}
    for step, (expected, *found) in enumerate(zip(alone, *by_rank, strict=True)):
        for key, value in expected.items():
            for other in found[1:]:
                assert torch.equal(other[key], found[0][key]), f"ranks differ in {key} after step {step}"
            if not value.is_floating_point():
                assert torch.equal(found[0][key], value), f"{key} after step {step}"
            elif not case.autocast or key.endswith("K"):  # memories and losses are rounded to bfloat16
                largest[key] = max(largest.get(key, 0.0), float((found[0][key] - value).abs().max()))
    if "MH_DIFFERENCES" in os.environ:
        with Path(os.environ["MH_DIFFERENCES"]).open("a") as file:
            file.write(f"| {name} | {len(results)} | {max(largest.values()):.1e} |\n")
    assert max(largest.values()) <= 1e-6, largest
    key_sets = of_layer(alone, "K").shape[0]
    updated = len(case.rows) // case.steps_of_keys * case.steps_of_keys
    assert of_layer(alone, "key_counter").sum() == sum(case.rows[:updated]) * key_sets
    if case.options["scramble"]:
        assert of_layer(alone, "scrambling_count").min() >= 1


def test_an_update_is_one_collective_of_one_shape(results: list[dict[str, Any]]) -> None:
    for found in (result["bytes"] for result in results):
        for name, (*sizes, none, one, four, five) in found.items():
            # two where a rank has more rows than any had before
            assert sizes == [none, four, four, four, four, five, five, five, five]
            row = 4 * INPUTS + (8 + 4) if name == "plain" else 4 * INPUTS + OUTPUTS * (8 + 4) + 8
            assert (none, one, four, five) == (8, 8 + row, 8 + 4 * row, 8 + 5 * row)


def test_sharded_memories_are_refused(results: list[dict[str, Any]]) -> None:
    for (sentence,) in (result["refused"] for result in results):
        assert sentence.startswith("MHLinear: M is spread over processes")


def test_rows_that_are_not_finite_are_left_out_alike(results: list[dict[str, Any]]) -> None:
    first, *others = (result["bad rows"] for result in results)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    ranks = len(results)
    good = sum(12 - len(range(step, 12, ranks)) for step in range(4))
    assert first["key_counter"].sum() == first["scale.seen"] == good
    if ranks == RANKS[0]:
        for name, value in bad_rows(0, 1).items():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9, msg=name)


def test_joining_with_uneven_batches_is_refused(results: list[dict[str, Any]]) -> None:
    for (sentence,) in (result["joining"] for result in results):
        assert sentence.startswith("MHLinear: ") and "Join" in sentence and "empty batches" in sentence


def test_gather_rows(results: list[dict[str, Any]]) -> None:
    ranks = len(results)
    for found in (result["gathered"] for result in results):
        assert found["size"] == ranks
        floats = torch.arange(6.0).view(2, 3) / 7
        big = 2**63 - 1
        expected = (
            torch.cat([floats + rank for rank in range(ranks)]),
            torch.tensor([value for rank in range(ranks) for value in (big, rank)]),
            torch.tensor([value for rank in range(ranks) for value in (True, rank == 1)]).view(-1, 1, 1),
        )
        for tensor, wanted in zip(found["even"], expected, strict=True):
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
        of_ranks = [rank for rank in range(ranks) for _ in range(1 + 2 * (rank % 2))]
        assert found["uneven"][0].tolist() == [[float(rank)] * 2 for rank in of_ranks]
        for name, dtype in (("first empty", torch.int32), ("bfloat16", torch.bfloat16)):
            assert found[name][0].tolist() == [[7]] * 3 and found[name][0].dtype == dtype
        assert [tuple(tensor.shape) for tensor in found["all empty"]] == [(0, 4), (0,)]
        assert found["in turn"] == [list(range(rows)) for rows in (7, 1, 0, 4, 9)]


def test_a_process_group_of_one_takes_sparse_gradients_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer = MHLinear.published(6, 3, key_mem_units=8, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")
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
    assert gather_rows(rows, more) == (rows, more) == gather_in_turn(rows, more)
