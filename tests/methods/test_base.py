"""The frame that all methods share."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mh_lightning
from mh_lightning import MHLinear
from mh_lightning.backbones import Identity, TimmBackbone
from mh_lightning.callbacks import ContinualMetrics, TaskBoundaries
from mh_lightning.data import Modes, Tensors
from mh_lightning.data.features import FeatureCache
from mh_lightning.errors import UserError
from mh_lightning.methods import FineTuning


class Diary(FineTuning):
    """Writes down what happens when."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Identity(4), nn.Linear, **options)
        self.diary: list[str] = []
        self.optimizers_seen: list[int] = []

    def on_task_start(self, task: int) -> None:
        self.diary.append(f"start {task}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.diary.append("step")
        optimizer = self.trainer.optimizers[0]
        if id(optimizer) not in self.optimizers_seen:
            self.optimizers_seen.append(id(optimizer))
            self.kept = [*getattr(self, "kept", []), optimizer]  # so that no id is given out again
        return super().training_step(batch, batch_idx)

    def on_task_end(self, task: int) -> None:
        self.diary.append(f"end {task}")

    def on_validation_start(self) -> None:
        self.diary.append("evaluate")


@pytest.fixture
def stream() -> Callable[..., Tensors]:
    def make(**options: Any) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(4).repeat(6)
        inputs = nn.functional.one_hot(labels).float() + 0.1 * torch.randn(24, 4, generator=generator)
        return Tensors(inputs, labels, inputs, labels, **{"increment": 2, "batch_size": 6, **options})

    return make


def fit(method: FineTuning, stream: Tensors, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=-1, reload_dataloaders_every_n_epochs=1,
                      num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder,
                      callbacks=[TaskBoundaries(), ContinualMetrics()], **options)  # fmt: skip
    trainer.fit(method, datamodule=stream)
    return trainer


def test_a_method_needs_a_stream_and_its_boundaries(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    method = FineTuning(Identity(4), nn.Linear)
    loader = DataLoader(TensorDataset(torch.ones(2, 4), torch.zeros(2).long()))
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, "max_epochs": 1}
    for act in ("fit", "test", "predict"):
        with pytest.raises(UserError, match="A method learns a stream, and the trainer was given loaders; give it a"):
            getattr(Trainer(**options), act)(method, loader)
    with pytest.raises(UserError, match=r"use mh_lightning.Trainer, or add"):
        Trainer(**options).fit(method, stream())


def test_the_head_starts_on_the_cpu(
    stream: Callable[..., Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))
    method = FineTuning(Identity(4), nn.Linear)
    torch.manual_seed(0)
    fit(method, stream(), tmp_path, max_steps=0)
    torch.manual_seed(0)
    assert isinstance(method.head, nn.Linear) and torch.equal(method.head.weight, nn.Linear(4, 4).weight)


def test_tasks_start_train_end_and_are_evaluated(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    method = Diary()
    trainer = fit(method, stream(epochs_per_task=2), tmp_path)
    steps = ["step"] * 4
    assert method.diary == ["start 0", *steps, "end 0", "evaluate", "start 1", *steps, "end 1", "evaluate"]
    assert trainer.current_epoch == 4
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("reset", [False, True])
def test_optimizer_is_made_anew_when_asked(stream: Callable[..., Tensors], tmp_path: Path, reset: bool) -> None:
    method = Diary(reset_optimizer=reset)
    fit(method, stream(), tmp_path)
    assert len(method.optimizers_seen) == (2 if reset else 1)


def test_optimizer_without_reset_keeps_its_moments(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    for reset, steps in ((False, 4), (True, 2)):
        method = Diary(reset_optimizer=reset, optimizer=torch.optim.Adam)
        trainer = fit(method, stream(), tmp_path / str(reset))
        (state, *_) = trainer.optimizers[0].state.values()
        assert state["step"] == steps


def test_frozen_backbone_is_out_of_the_optimizer_and_the_graph(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3] * 2)
    method = FineTuning(TimmBackbone("test_resnet", image_size=32), nn.Linear)
    before = {name: value.clone() for name, value in method.backbone.state_dict().items()}
    trainer = fit(method, Tensors(images, labels, images, labels, increment=2, batch_size=4), tmp_path)
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == 2
    assert not any(module.training for module in method.backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in method.backbone.state_dict().items())
    assert not method.features(torch.zeros(1, 3, 32, 32)).requires_grad


def test_keys_move_once_a_step_inside_lightning_and_at_once_outside(
    stream: Callable[..., Tensors], tmp_path: Path
) -> None:
    def head(features: int, classes: int) -> MHLinear:
        return MHLinear.published(features, classes, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")

    method = FineTuning(Identity(4), head)
    fit(method, stream(), tmp_path, accumulate_grad_batches=2)
    layer = method.head
    assert isinstance(layer, MHLinear)
    assert layer.key_counter.sum() == 24
    layer.train()
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.key_counter.sum() == 29


def test_the_head_is_told_when_it_cannot_be_made(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.init_args\.head"):
        fit(FineTuning(Identity(4), nn.Bilinear), stream(), tmp_path)


def test_outputs_that_are_not_finite_are_refused(stream: Callable[..., Tensors], tmp_path: Path) -> None:
    class Broken(Identity):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    with pytest.raises(UserError, match="NaN"):
        fit(FineTuning(Broken(4), nn.Linear), stream(), tmp_path)


@pytest.mark.parametrize("fails", [False, True])
def test_images_are_taken_again_after_a_run_on_kept_features(tmp_path: Path, fails: bool) -> None:
    class Failing(FineTuning):
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            if fails:
                raise RuntimeError("stopped")
            return super().training_loss(batch)

    images = torch.randint(0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3] * 2)
    method = Failing(TimmBackbone("test_resnet", image_size=32), nn.Linear)
    data = Tensors(images, labels, images, labels, increment=2, feature_cache=FeatureCache(str(tmp_path)))
    with pytest.raises(RuntimeError, match="stopped") if fails else nullcontext():
        fit(method, data, tmp_path)
    assert method(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


class Forgetful(FineTuning):
    """Keeps what it learnt where no checkpoint looks."""

    def on_task_end(self, task: int) -> None:
        self.memory = {name: value.detach().clone() for name, value in self.head.named_parameters()}  # type: ignore[union-attr]
        self.teacher = copy.deepcopy(self.head)


def test_state_that_no_checkpoint_holds_is_told(tmp_path: Path) -> None:
    stream = Modes(scenario="CI", num_samples=60, batch_size=8)
    method = Forgetful(Identity(2), nn.Linear, partial(torch.optim.SGD, lr=0.1))
    with pytest.warns(UserWarning, match="no checkpoint") as told:
        mh_lightning.fit(
            method, stream, run_dir=str(tmp_path), pictures=False, accelerator="cpu", enable_progress_bar=False
        )
    said = " ".join(str(one.message) for one in told)
    assert "keeps tensors in self.memory, which no checkpoint holds" in said
    assert "make_module('teacher') returns one to fill" in said


def test_the_mean_over_ranks_of_a_mean_loss_is_that_over_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    method = FineTuning(Identity(2), nn.Linear, partial(torch.optim.SGD, lr=0.1))
    losses, shares = torch.arange(1.0, 8.0), (slice(0, 3), slice(3, 3), slice(3, 7))
    monkeypatch.setattr("mh_lightning.methods.base.world_size", lambda: len(shares))
    by_rank = [method.mean_over_samples(losses[share], rows=len(losses)) for share in shares]
    assert torch.stack(by_rank).mean() == losses.mean()


class Teaching(FineTuning):
    """Makes a module that could be trained."""

    def on_task_end(self, task: int) -> None:
        self.teacher = copy.deepcopy(self.head)

    def make_module(self, name: str) -> nn.Module:
        return self.make_head()


@pytest.mark.parametrize("reset_optimizer", [False, True])
def test_a_module_born_in_the_stream_is_not_trained_and_the_run_resumes(tmp_path: Path, reset_optimizer: bool) -> None:
    def run(folder: str, **options: Any) -> Any:
        stream = Modes(scenario="CI", num_samples=60, batch_size=8)
        method = Teaching(Identity(2), nn.Linear, partial(torch.optim.Adam, lr=0.1), reset_optimizer=reset_optimizer)
        torch.manual_seed(0)
        found = mh_lightning.fit(
            method, stream, run_dir=str(tmp_path / folder), pictures=False, accelerator="cpu",
            enable_progress_bar=False, **options,
        )  # fmt: skip
        return found, method

    whole, method = run("whole")
    assert not {id(one) for one in method.teacher.parameters()} & {id(one) for one in method.head_parameters_to_train()}
    resumed, _ = run("resumed", ckpt_path=str(whole.folder / "checkpoints" / "task_2.ckpt"))
    assert torch.equal(torch.tensor(resumed.accuracy_matrix), torch.tensor(whole.accuracy_matrix))
