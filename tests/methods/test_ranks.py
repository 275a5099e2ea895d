"""Methods on several ranks learn, log and predict what one process does, from batches that do not deal out evenly."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import strategies as st
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mh_lightning import MHLinear
from mh_lightning.backbones import Backbone, Identity, TimmBackbone
from mh_lightning.callbacks import ContinualMetrics, CostMonitor, OnlineAccuracy, RankConsistency
from mh_lightning.data import StreamDataModule, Tensors
from mh_lightning.distributed import process_rank, world_size
from mh_lightning.errors import UserError
from mh_lightning.heads import (
    ClassMeans,
    KernelMemoryUnits,
    RandomProjectionRidge,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
    TruncatedProjection,
)
from mh_lightning.methods import (
    EWC,
    SLCA,
    AveragedGEM,
    ClassifierAlignment,
    ClosedForm,
    ContinualMethod,
    DERPlusPlus,
    Ensemble,
    ExperienceReplay,
    FineTuning,
    GDumb,
    ICaRL,
    JointTraining,
    LwF,
    MaximallyInterferedRetrieval,
    SynapticIntelligence,
    WeightAligning,
)
from mh_lightning.methods.trainer_checks import check_strategy
from tests.blobs import FEATURES, blobs
from tests.fits import fit, on_ranks

HIDDEN = 6
TASK_SIZES = (17, 13, 10)  # of batches of 8: the last ones have 1, 5 and 2 samples
memory_head = partial(
    MHLinear, key_mem_units=5, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_alpha=0.999, tau_mu=20,
    tau_eta=5, beta_k=0.05, random_memories=True,
)  # fmt: skip
gradient_keys = partial(memory_head, upd_m="vanilla", upd_k="grad_not_WTA", distance="euclidean", shared_keys=False)


class Tuned(Backbone):
    """A layer that learns, and does not take an empty batch."""

    num_features = HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x)
        return torch.tanh(self.layer(x))


class Case(NamedTuple):
    """A method, and how it is trained."""

    make: Callable[..., ContinualMethod]
    options: dict[str, Any] = {}  # noqa: RUF012
    trainer: dict[str, Any] = {}  # noqa: RUF012
    ranks: tuple[int, ...] = (3,)
    epochs_per_task: int = 1

    def method(self) -> ContinualMethod:
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
        closed = self.make is ClosedForm
        defaults = {} if closed else {"head": memory_head, "optimizer": sgd}
        torch.manual_seed(process_rank())  # ranks start from the weights of the first
        return self.make(**{"backbone": Identity(FEATURES) if closed else Tuned(), **defaults, **self.options})


REPLAY = {"buffer_size": 20, "replay_batch_size": 4}
ALIGNMENT = ClassifierAlignment(epochs=2, samples_per_class=11, batch_size=19, freeze_keys=False)
CASES = {
    "fine-tuning": Case(FineTuning, ranks=(3, 4)),
    "gradient keys": Case(FineTuning, {"head": gradient_keys, "classes_in_loss": "batch"}),
    "accumulated": Case(FineTuning, {"loss": "hinge"}, {"accumulate_grad_batches": 2}),
    "experience replay": Case(ExperienceReplay, REPLAY, {"accumulate_grad_batches": 2}, (3, 4), 2),
    "A-GEM": Case(AveragedGEM, REPLAY),
    "MIR": Case(MaximallyInterferedRetrieval, {**REPLAY, "candidates": 10}),
    "GDumb": Case(GDumb, {**REPLAY, "epochs": 2}),
    "joint training": Case(JointTraining, {"epochs": 2}),
    "ensemble": Case(Ensemble, {"members": 2}),
    "EWC": Case(EWC, {"fisher": "exact", "fisher_samples": 10}),
    "synaptic intelligence": Case(SynapticIntelligence, {}, {"accumulate_grad_batches": 2}),
    "LwF": Case(LwF),
    "DER++": Case(DERPlusPlus, REPLAY, {}, (4,)),
    "iCaRL": Case(ICaRL, REPLAY),
    "weight aligning": Case(WeightAligning, REPLAY, {}, (4,)),
    "SLCA": Case(SLCA, {"alignment": ALIGNMENT}),
    "nearest class mean": Case(ClosedForm, {"head": ClassMeans}),
    "streaming LDA": Case(ClosedForm, {"head": StreamingLinearDiscriminant}),
    "RanPAC": Case(ClosedForm, {"head": partial(RandomProjectionRidge, num_projections=12)}, {}, (4,)),
    "FeCAM": Case(ClosedForm, {"head": ShrunkClassCovariances}, {}, (4,)),
    "kernel memory head": Case(
        ClosedForm, {"head": partial(KernelMemoryUnits, key_mem_units=9, max_bytes=900, seed=1)}, {}, (4,)
    ),
    "LoRanPAC": Case(ClosedForm, {"head": partial(TruncatedProjection, num_projections=12, rank=12, seed=1)}),
}


def stream(**options: Any) -> Tensors:
    """Seven classes in three tasks."""
    (x, targets), (x_test, y_test) = blobs(600, 1), blobs(50, 2)
    groups = [targets < 3, (targets >= 3) & (targets < 5), targets >= 5]
    kept = torch.cat([group.nonzero().flatten()[:size] for group, size in zip(groups, TASK_SIZES, strict=True)])
    defaults: dict[str, Any] = {"first_task_size": 3, "increment": 2, "batch_size": 8}
    return Tensors(x[kept], targets[kept], x_test, y_test, **defaults | options)


class Curves(Callback):
    """Keeps what is logged after each batch; and that the state which is alike is not sent around."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model: Any = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):  # all but the number of SLCA's tasks
            assert sum(buffer.numel() for buffer in model.modules_buffers) <= 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        logged = trainer.callback_metrics
        self.values.append([float(logged[name]) for name in ("train/loss", "train/accuracy") if name in logged])


def learnt(case: Case, folder: Path, data: StreamDataModule | None = None) -> dict[str, Any]:
    """All that a fit ends up with."""
    curves, online, cost = Curves(), OnlineAccuracy(), CostMonitor()
    method, ranks = case.method(), world_size_wanted()
    if ranks > 1:
        options = {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))}
    else:
        options = {}
    callbacks = [RankConsistency(), online, cost, curves] if data is None else []
    trainer = fit(
        method,
        folder,
        data or stream(epochs_per_task=case.epochs_per_task),
        devices=ranks,
        precision="64-true",
        enable_checkpointing=False,
        callbacks=callbacks,
        **case.trainer,
        **options,
    )
    (metrics,) = (one for one in trainer.callbacks if isinstance(one, ContinualMetrics))  # type: ignore[attr-defined]
    return {
        "curves": torch.tensor(curves.values, dtype=torch.float64),
        "samples": torch.tensor(cost._samples),
        "online": online._correct,
        "matrix": metrics._counts["test"]["correct"],
        "of_task": metrics._counts["test"]["correct_of_task"],
        "evaluated": metrics._counts["test"]["total"],
        **{name: value.clone() for name, value in method.state_dict().items()},
    }


def world_size_wanted() -> int:
    return int(os.environ.get("RANKS_OF_TEST", 1))


# --- images, through backbones that do not take every empty batch


def images() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(10) % 2
    return Tensors(pixels, labels, pixels, labels, increment=2, batch_size=4)  # the last batch has two


def timm(name: str) -> Case:
    return Case(FineTuning, {"backbone": TimmBackbone(name, frozen=False), "head": nn.Linear})


def diverges_on_the_last_rank(folder: Path) -> str:
    class Broken(Tuned):
        def forward(self, x: Tensor) -> Tensor:
            broken = self.training and process_rank() == world_size() - 1
            return torch.full((len(x), HIDDEN), torch.nan) if broken else super().forward(x)

    try:
        learnt(Case(FineTuning, {"backbone": Broken()}), folder)
    except UserError as error:
        return str(error)
    return "nothing"


def work(rank: int, folder: Path) -> dict[str, Any]:
    ranks = int(folder.name)
    os.environ |= {"RANKS_OF_TEST": str(ranks), "PL_GLOBAL_SEED": "5"}
    found: dict[str, Any] = {name: learnt(case, folder / name) for name, case in CASES.items() if ranks in case.ranks}
    if ranks == 3:
        found |= {name: learnt(timm(name), folder / name, images()) for name in ("test_vit", "test_resnet")}
        found["diverged"] = diverges_on_the_last_rank(folder)
    return found


@pytest.fixture(scope="module")
def found_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank has learnt, for each number of ranks."""
    found = {}
    for ranks in (3, 4):
        folder = tmp_path_factory.mktemp("ranks") / str(ranks)
        folder.mkdir()
        found[ranks] = on_ranks(ranks, work, folder)
    return found


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


def assert_alike(name: str, alone: dict[str, Tensor], by_rank: list[dict[str, Any]]) -> None:
    largest = 0.0
    for key, value in alone.items():
        for found in by_rank[1:]:
            assert torch.equal(found[key], by_rank[0][key]), f"ranks differ in {key}"
        if value.is_floating_point():
            assert torch.allclose(by_rank[0][key], value, rtol=1e-6, atol=1e-6), key
            largest = max([largest, *(by_rank[0][key] - value).abs().flatten().tolist()])
        else:
            assert torch.equal(by_rank[0][key], value), key
    if "MH_DIFFERENCES" in os.environ:
        with Path(os.environ["MH_DIFFERENCES"]).open("a") as file:
            file.write(f"| {name} | {len(by_rank)} | {largest:.1e} |\n")


@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_what_one_process_does(
    name: str, found_by_ranks: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    alone = learnt(CASES[name], tmp_path)
    assert alone["samples"] == CASES[name].epochs_per_task * sum(TASK_SIZES)
    for ranks in CASES[name].ranks:
        assert_alike(name, alone, [found[name] for found in found_by_ranks[ranks]])


def test_a_transformer_learns_from_shares_that_are_empty(
    found_by_ranks: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    alone = learnt(timm("test_vit"), tmp_path, images())
    assert_alike("test_vit", alone, [found["test_vit"] for found in found_by_ranks[3]])


def test_batch_norm_ends_alike_and_finite(found_by_ranks: dict[int, list[dict[str, Any]]]) -> None:
    first, *others = (found["test_resnet"] for found in found_by_ranks[3])
    for key, value in first.items():
        assert bool(value.isfinite().all()), key
        assert all(torch.equal(other[key], value) for other in others), key


def test_all_ranks_stop_together(found_by_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in found_by_ranks[3]:
        assert found["diverged"].startswith("The training loss became nan at step 0")


# --- strategies


@pytest.mark.parametrize(
    "kind", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"]
)
def test_strategies_that_break_the_state_are_refused(kind: str) -> None:
    strategy = object.__new__(getattr(st, kind))  # most cannot be made without their hardware or library
    with pytest.raises(UserError, match=rf"trainer\.strategy: {kind} .* use ddp\."):
        check_strategy(strategy)


def test_strategies_that_keep_the_model_whole() -> None:
    for strategy in (st.SingleDeviceStrategy(), DDPStrategy(), DDPStrategy(find_unused_parameters=True)):
        check_strategy(strategy)
    with pytest.raises(UserError, match="model_averaging_period"):
        check_strategy(DDPStrategy(model_averaging_period=4))


def test_a_strategy_is_refused_before_anything_is_made() -> None:
    method = Case(FineTuning).method()
    method._trainer = SimpleNamespace(strategy=object.__new__(st.FSDPStrategy))  # type: ignore[assignment]
    with pytest.raises(UserError, match="FSDPStrategy"):
        method.setup("fit")
    assert method.head is None
