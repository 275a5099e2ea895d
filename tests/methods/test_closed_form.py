"""Methods that solve their head in closed form, in a trainer: each is its head on all training samples."""

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mh_lightning.backbones import Identity
from mh_lightning.callbacks import ContinualMetrics, OnlineAccuracy, TaskProgressBar
from mh_lightning.distributed import process_rank
from mh_lightning.errors import UserError
from mh_lightning.heads import (
    ClassMeans,
    KernelMemoryUnits,
    RandomProjectionRidge,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
)
from mh_lightning.methods import ClosedForm, Head
from tests.blobs import CLASSES, FEATURES, blobs
from tests.fits import RANKS, fit, on_two_ranks, stream

Make = Callable[[], ClosedForm]


def nearest_class_mean() -> ClosedForm:
    return ClosedForm(Identity(FEATURES), ClassMeans)


def streaming_lda() -> ClosedForm:
    return ClosedForm(Identity(FEATURES), partial(StreamingLinearDiscriminant, shrinkage=0.01))


def ranpac() -> ClosedForm:
    return ClosedForm(Identity(FEATURES), partial(RandomProjectionRidge, num_projections=20, seed=2))


def fecam() -> ClosedForm:
    return ClosedForm(Identity(FEATURES), partial(ShrunkClassCovariances, tukey=1.0))


def kernel_memory_head() -> ClosedForm:
    return ClosedForm(Identity(FEATURES), partial(KernelMemoryUnits, key_mem_units=9, max_bytes=900, seed=2))


METHODS: list[Make] = [nearest_class_mean, streaming_lda, ranpac, fecam, kernel_memory_head]
every_method = pytest.mark.parametrize("make", METHODS)


def state_of(method: ClosedForm) -> dict[str, Tensor]:
    return copy.deepcopy(method.closed_form_head.state_dict())


@every_method
@pytest.mark.parametrize("options", [{}, {"epochs_per_task": 2}, {"batch_size": 1, "chunk_size": 16}], ids=str)
def test_a_fit_is_the_head_on_all_training_samples(make: Make, options: dict[str, int], tmp_path: Path) -> None:
    method, data = make(), stream(**options)
    batches: list[tuple[Tensor, Tensor]] = []
    learn = method.learn

    def watched(features: Tensor, targets: Tensor) -> Any:
        batches.append((features, targets))
        return learn(features, targets)

    method.learn = watched  # type: ignore[method-assign]
    callbacks = [OnlineAccuracy(), TaskProgressBar()]
    trainer = fit(method, tmp_path, data, callbacks=callbacks, enable_progress_bar=True)
    x, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert sorted(targets.tolist()) == sorted(data._splits["train"].labels.tolist())  # once, whatever the epochs
    expected: Any = make()._make_head(FEATURES, CLASSES)
    expected.update(x, targets)
    predicted: Any = trainer.predict(method, data)
    queries = blobs(50, 2)[0]
    torch.testing.assert_close(torch.cat(predicted), expected.probabilities(queries), rtol=1e-3, atol=1e-4)
    # only where predictions before learning are cheap
    assert (tmp_path / "accuracy_over_stream.png").exists() == (make is nearest_class_mean)


@every_method
def test_a_resumed_fit_ends_as_if_it_had_not_been_stopped(make: Make, tmp_path: Path) -> None:
    whole, resumed = make(), make()
    trainer = fit(whole, tmp_path / "whole")
    again = fit(resumed, tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoints" / "task_1.ckpt")
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[name], value)
    matrices = [
        next(one for one in run.callbacks if isinstance(one, ContinualMetrics))._metrics["test"].compute()  # type: ignore[attr-defined]
        for run in (trainer, again)
    ]
    assert torch.equal(matrices[0]["accuracy_matrix"], matrices[1]["accuracy_matrix"])
    assert matrices[0]["accuracy_matrix"].diagonal().min() > 0.5


class NothingIsBroadcast(Callback):
    """The sums are on every rank already, and may be large."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model: Any = trainer.strategy.model
        assert isinstance(model, DistributedDataParallel) and not model.modules_buffers


def work(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    states = {}
    for make in METHODS:
        method = make()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        options = {"callbacks": [NothingIsBroadcast()], "enable_checkpointing": False}
        fit(method, folder / make.__name__, devices=RANKS, strategy=strategy, **options)
        states[make.__name__] = state_of(method)
    return states


@pytest.fixture(scope="module")
def states_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank has learnt; one spawn for all methods."""
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@every_method
def test_two_processes_end_up_with_the_state_of_one(
    make: Make, states_of_ranks: list[dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    alone = make()
    fit(alone, tmp_path, callbacks=[], enable_checkpointing=False)
    for name, value in state_of(alone).items():
        for states in states_of_ranks:
            assert torch.equal(states[make.__name__][name], value)


@every_method
def test_features_that_are_not_finite_are_refused(make: Make, tmp_path: Path) -> None:
    class Broken(Identity):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, float("nan")) if len(x) > 1 else x

    method = make()
    method.backbone = Broken(FEATURES)
    with pytest.raises(UserError, match=r"model\.init_args\.backbone, or the training data: .* the features hold NaN"):
        fit(method, tmp_path)


class BrokenOnOneRank(Identity):
    """Gives NaN on the second rank, later on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, float("nan")) if process_rank() == 1 and self.calls > 3 else x


def refused(rank: int, folder: Path) -> list[str]:
    told = []
    for make in METHODS:
        method = make()
        method.backbone = BrokenOnOneRank(FEATURES)
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20))
        with pytest.raises(UserError) as error:
            fit(method, folder / make.__name__, devices=RANKS, strategy=strategy, callbacks=[],
                enable_checkpointing=False)  # fmt: skip
        told.append(str(error.value))
    return told


def test_what_one_rank_brings_is_refused_on_all(tmp_path: Path) -> None:
    first, second = on_two_ranks(refused, tmp_path)
    assert first == second and len(first) == len(METHODS)
    assert all("the features hold NaN or infinite values" in sentence for sentence in first)


@every_method
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(make: Make, precision: str, tmp_path: Path) -> None:
    plain, other = make(), make()
    data = stream()
    data.setup("fit")
    for samples in data._splits.values():  # which no precision rounds
        assert samples.features is not None
        samples.features.copy_(samples.features.bfloat16())
    fit(plain, tmp_path / "plain", data)
    fit(other, tmp_path / "other", data, precision=precision)
    for name, value in state_of(plain).items():
        assert torch.equal(state_of(other)[name], value) and state_of(other)[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (partial(StreamingLinearDiscriminant, shrinkage=2.0), r"shrinkage must lie in \[0, 1\], got 2.0"),
        (partial(RandomProjectionRidge, num_projections=-1), "num_projections must be at least 1, got -1"),
        (partial(KernelMemoryUnits, key_mem_units=0), "key_mem_units must be at least 1, got 0"),
        (partial(ShrunkClassCovariances, tukey=-0.5), "tukey must be above 0 and finite, got -0.5"),
        (partial(KernelMemoryUnits, deltas=0), "model.init_args.head: .* unexpected keyword argument 'deltas'"),
        (nn.Linear, "model.init_args.head makes a Linear; ClosedForm needs a head in closed form"),
    ],
)
def test_options_are_refused_before_any_data_are_read(head: Head, part: str) -> None:
    with pytest.raises(UserError, match=part):
        ClosedForm(Identity(2), head)
