"""Rivals, against hand-worked behaviour."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import ContinualMetrics, TaskBoundaries
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.methods import (
    AveragedGEM,
    ContinualMethod,
    Ensemble,
    ExperienceReplay,
    FineTuning,
    GDumb,
    JointTraining,
    MaximallyInterferedRetrieval,
)
from mh_lightning.methods.averaged_gem import project
from mh_lightning.methods.maximally_interfered_retrieval import most_interfered

FEATURES, CLASSES = 4, 4


def stream(**options: Any) -> Tensors:
    """Four far classes in two tasks, ten samples each; what they share makes a linear layer forget."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % CLASSES
    x = 2 + 3 * torch.eye(FEATURES)[labels] + 0.3 * torch.randn(40, FEATURES, generator=generator)
    return Tensors(x, labels, x, labels, **{"increment": 2, "batch_size": 1, "chunk_size": 10} | options)


def linear(features: int, classes: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(features, classes)


def fit(method: ContinualMethod, folder: Path, data: Tensors | None = None) -> Trainer:
    trainer = Trainer(accelerator="cpu", max_epochs=-1, reload_dataloaders_every_n_epochs=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=mkdtemp(dir=folder),
                      callbacks=[TaskBoundaries(), ContinualMetrics(figures=False)])  # fmt: skip
    trainer.fit(method, datamodule=data or stream())
    return trainer


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# --- experience replay


def test_replay_adds_the_mean_loss_of_what_is_drawn(tmp_path: Path) -> None:
    calls: list[tuple[int, float, float]] = []

    class Watched(ExperienceReplay):
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            assert self.replay_buffer is not None
            drawn = self.replay_buffer.draw(self.replay_batch_size)
            expected = self.losses(self(batch[0]), batch[1]).mean()
            if drawn is not None:
                expected = expected + self.losses(self(drawn[0]), drawn[1]).mean()
            loss, logits = super().training_loss(batch)
            calls.append((0 if drawn is None else len(drawn[0]), float(expected.detach()), float(loss.detach())))
            torch.testing.assert_close(logits, self(batch[0]))  # of a larger batch, where products may round otherwise
            return loss, logits

    method = Watched(Identity(FEATURES), linear, buffer_size=8, replay_batch_size=3, optimizer=sgd)
    fit(method, tmp_path, stream(batch_size=2))
    assert [count for count, _, _ in calls[:4]] == [0, 2, 3, 3] and len(calls) == 20
    for _, expected, loss in calls:
        assert loss == pytest.approx(expected, abs=1e-5)
    assert method.replay_buffer is not None and method.replay_buffer.seen == 40


def test_only_the_first_epoch_of_a_task_is_remembered_and_draws_go_on(tmp_path: Path) -> None:
    drawn: list[tuple[float, ...]] = []

    class Watched(ExperienceReplay):
        def loss_with_replay(self, batch: Any, replayed: Any) -> tuple[Tensor, Tensor]:
            if replayed is not None:
                drawn.append(tuple(replayed[0][:, 0].tolist()))
            return super().loss_with_replay(batch, replayed)

    method = Watched(Identity(FEATURES), linear, buffer_size=20, replay_batch_size=4, optimizer=sgd)
    fit(method, tmp_path, stream(epochs_per_task=3))
    assert method.replay_buffer is not None and method.replay_buffer.seen == 40
    assert len(drawn) == 119 and len(set(drawn[20:60])) > 35  # the second and third epoch of the first task


def accuracies(method: ContinualMethod, folder: Path) -> Tensor:
    trainer = fit(method, folder)
    (metrics,) = (callback for callback in trainer.callbacks if isinstance(callback, ContinualMetrics))  # type: ignore[attr-defined]
    return metrics._metrics["test"].compute()["accuracy_matrix"]


def test_replay_keeps_what_fine_tuning_forgets(tmp_path: Path) -> None:
    plain = accuracies(FineTuning(Identity(FEATURES), linear, optimizer=sgd), tmp_path)
    replayed = accuracies(ExperienceReplay(Identity(FEATURES), linear, buffer_size=20, optimizer=sgd), tmp_path)
    assert plain[0, 0] == replayed[0, 0] == 1
    assert replayed[1, 0] == 1 > plain[1, 0]


# --- A-GEM


@pytest.mark.parametrize(
    ("gradient", "reference", "expected"),
    [
        ([1.0, 1.0], [1.0, 0.0], [1.0, 1.0]),  # agrees
        ([0.0, 1.0], [1.0, 0.0], [0.0, 1.0]),  # at a right angle
        ([-3.0, 1.0], [2.0, 0.0], [0.0, 1.0]),  # against: that part goes
        ([-1.0, 0.0], [1.0, 1.0], [-0.5, 0.5]),
    ],
)
def test_projection(gradient: list[float], reference: list[float], expected: list[float]) -> None:
    projected = project(torch.tensor(gradient), torch.tensor(reference))
    torch.testing.assert_close(projected, torch.tensor(expected))
    assert projected @ torch.tensor(reference) > -1e-6


def test_no_step_goes_against_earlier_tasks(tmp_path: Path) -> None:
    products: list[tuple[int, float, float]] = []

    class Watched(AveragedGEM):
        def adjust_gradients(self) -> None:
            assert self.replay_buffer is not None
            before = torch.cat([one.grad.flatten() for one in self.parameters() if one.grad is not None])
            super().adjust_gradients()
            drawn = self.replay_buffer.draw(self.replay_batch_size, before_task=self._task)
            after = torch.cat([one.grad.flatten() for one in self.parameters() if one.grad is not None])
            if drawn is None:
                assert torch.equal(before, after)
                return
            loss = self.losses(self(drawn[0]), drawn[1]).mean()
            reference = torch.cat([part.flatten() for part in self.gradients(loss)])
            products.append((self._task, float(before @ reference), float(after @ reference)))

    fit(Watched(Identity(FEATURES), linear, buffer_size=20, optimizer=sgd), tmp_path)
    assert {task for task, _, _ in products} == {1} and len(products) == 20
    assert any(before < 0 for _, before, _ in products)
    for _, before, after in products:
        assert after == pytest.approx(max(before, 0), abs=1e-5)


# --- MIR


def test_the_most_interfered_by_hand(tmp_path: Path) -> None:
    assert most_interfered(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), 9).tolist() == [1, 0]
    chosen: list[tuple[list[int], list[int]]] = []

    class Watched(MaximallyInterferedRetrieval):
        def _harmed(self, batch: Any, drawn: Any) -> Any:
            found = super()._harmed(batch, drawn)
            twin = nn.Linear(FEATURES, CLASSES)
            assert self.head is not None
            twin.load_state_dict(self.head.state_dict())
            before = self.losses(twin(drawn[0]), drawn[1])
            self.losses(twin(batch[0]), batch[1]).mean().backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter -= 0.1 * parameter.grad
                after = self.losses(twin(drawn[0]), drawn[1])
            order = (before - after).argsort().tolist()
            expected = [float(drawn[0][place, 0]) for place in order[: self.replay_batch_size]]
            chosen.append(([float(value) for value in found[0][:, 0]], expected))
            return found

    method = Watched(Identity(FEATURES), linear, buffer_size=20, replay_batch_size=2, candidates=6, optimizer=sgd)
    fit(method, tmp_path)
    compared = [(sorted(found), sorted(expected)) for found, expected in chosen if len(found) == 2]
    assert len(compared) >= 35 and all(found == expected for found, expected in compared)


def test_an_imagined_step_leaves_no_trace(tmp_path: Path) -> None:
    def head(features: int, classes: int) -> nn.Module:
        torch.manual_seed(1)
        return MHLinear.published(features, classes, key_mem_units=6, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")

    class Watched(MaximallyInterferedRetrieval):
        def _harmed(self, batch: Any, drawn: Any) -> Any:
            assert self.head is not None
            before = {name: value.clone() for name, value in self.head.state_dict().items()}
            found = super()._harmed(batch, drawn)
            assert self.head.training
            assert all(torch.equal(value, before[name]) for name, value in self.head.state_dict().items())
            return found

    method = Watched(Identity(FEATURES), head, buffer_size=20, replay_batch_size=2, candidates=6, optimizer=sgd)
    fit(method, tmp_path)
    assert isinstance(method.head, MHLinear)
    # each sample once, and two replayed beside each but the first two: one and two
    assert method.head.key_counter.sum() == 40 + 38 * 2 + 1


# --- methods that learn anew


def test_gdumb_learns_from_its_balanced_buffer_alone(tmp_path: Path) -> None:
    seen: list[tuple[int, set[float]]] = []

    class Watched(GDumb):
        def on_task_end(self, task: int) -> None:
            starts = [parameter.clone() for parameter in self.parameters()]
            super().on_task_end(task)
            assert any(not torch.equal(*pair) for pair in zip(starts, self.parameters(), strict=True))

        def batches(self, task: int, epoch: int) -> Any:
            for batch, rows in super().batches(task, epoch):
                seen.append((task, set(batch[0][:, 0].tolist())))
                yield batch, rows

    method = Watched(
        Identity(FEATURES), linear, buffer_size=8, replay_batch_size=4, epochs=20,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )  # fmt: skip
    matrix = accuracies(method, tmp_path)
    assert method.replay_buffer is not None
    assert torch.bincount(method.replay_buffer.content()[1]).tolist() == [2, 2, 2, 2]
    assert [task for task, _ in seen] == [0] * 40 + [1] * 40
    assert seen[0][1] | seen[1][1] != seen[2][1] | seen[3][1] or seen[0][1] != seen[2][1]  # in another order
    assert (matrix[0, 0], matrix[1, 0], matrix[1, 1]) == (1, 1, 1)


def test_nothing_is_learnt_from_the_stream_itself(tmp_path: Path) -> None:
    class Untrained(GDumb):
        def on_task_end(self, task: int) -> None:
            pass

    method = Untrained(Identity(FEATURES), linear, buffer_size=8, optimizer=sgd)
    fit(method, tmp_path)
    assert method.head is not None
    expected = linear(FEATURES, CLASSES).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in method.head.state_dict().items())


def test_retraining_starts_from_the_same_weights(tmp_path: Path) -> None:
    starts: list[Tensor] = []

    class Watched(JointTraining):
        def batches(self, task: int, epoch: int) -> Any:
            if epoch == 0:
                assert isinstance(self.head, nn.Linear)
                starts.append(self.head.weight.detach().clone())
            return super().batches(task, epoch)

    method = Watched(Identity(FEATURES), linear, epochs=3, optimizer=sgd)
    matrix = accuracies(method, tmp_path)
    assert len(starts) == 2 and torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], linear(FEATURES, CLASSES).weight)
    assert matrix[1].tolist() == [1, 1]


def test_joint_training_sees_all_tasks_so_far(tmp_path: Path) -> None:
    seen: dict[tuple[int, int], list[int]] = {}

    class Watched(JointTraining):
        def batches(self, task: int, epoch: int) -> Any:
            batches = list(super().batches(task, epoch))
            seen[task, epoch] = torch.cat([targets for (_, targets, _), _ in batches]).tolist()
            return batches

    fit(Watched(Identity(FEATURES), linear, epochs=2, optimizer=sgd), tmp_path)
    assert sorted(seen[0, 0]) == [0] * 10 + [1] * 10
    assert sorted(seen[1, 0]) == [label for label in range(4) for _ in range(10)]
    assert seen[1, 0] != seen[1, 1]


# --- ensemble


def test_an_ensemble_averages_probabilities_and_each_member_learns_alone(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def head(features: int, classes: int) -> nn.Module:
        torch.manual_seed(len(made))
        made.append(nn.Linear(features, classes))
        return made[-1]

    method = Ensemble(Identity(FEATURES), head, members=3, optimizer=sgd)
    fit(method, tmp_path)
    x = torch.randn(5, FEATURES)
    probabilities = torch.stack([torch.softmax(member(x), dim=1) for member in made]).mean(dim=0)
    torch.testing.assert_close(method(x).exp(), probabilities)
    for number, member in enumerate(made):

        def alone(features: int, classes: int, number: int = number) -> nn.Module:
            torch.manual_seed(number)
            return nn.Linear(features, classes)

        single = FineTuning(Identity(FEATURES), alone, optimizer=sgd)
        fit(single, tmp_path)
        assert single.head is not None
        for name, value in single.head.state_dict().items():
            torch.testing.assert_close(member.state_dict()[name], value)


# --- bad input


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: ExperienceReplay(Identity(4), linear, buffer_size=3), "buffer_size=3 is smaller than the 4 classes"),
        (lambda: GDumb(Identity(4), linear, buffer_size=8, epochs=0), "epochs must be at least 1, got 0"),
        (lambda: ExperienceReplay(Identity(4), linear, 8, replay_batch_size=0), "replay_batch_size"),
        (lambda: Ensemble(Identity(4), linear, members=0), "members must be at least 1, got 0"),
        (lambda: FineTuning(Identity(5), linear), "num_features is 5"),
    ],
)
def test_refusals(make: Callable[[], ContinualMethod], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        fit(make(), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_learning_anew_has_no_scaling_of_gradients() -> None:
    method = JointTraining(Identity(4), linear)
    method._trainer = SimpleNamespace(precision="16-mixed")  # type: ignore[assignment]  # which needs a GPU
    with pytest.raises(UserError, match=r"trainer\.precision=16-mixed: JointTraining"):
        method.on_fit_start()
