"""Which classes the loss of a new sample sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.backbones import Identity
from mh_lightning.errors import UserError
from mh_lightning.methods import Ensemble, ExperienceReplay, FineTuning, JointTraining, MaximallyInterferedRetrieval
from tests.methods.test_rivals import fit, linear, sgd, stream


def trained(folder: Path, kind: type[FineTuning] = FineTuning, **options: Any) -> Tensor:
    """The rows of the head's weights, one a class, after two tasks of two classes."""
    method = kind(Identity(4), linear, optimizer=sgd, **options)
    fit(method, folder, stream(batch_size=2))
    assert isinstance(method.head, nn.Linear)
    return method.head.weight.detach()


@pytest.mark.parametrize("classes", ["task", "batch"])
def test_earlier_classes_are_left_alone(tmp_path: Path, classes: str) -> None:
    after_each_task: list[Tensor] = []

    class Watched(FineTuning):
        def on_task_end(self, task: int) -> None:
            assert isinstance(self.head, nn.Linear)
            after_each_task.append(self.head.weight.detach().clone())

    for one in (classes, "all"):
        trained(tmp_path, Watched, classes_in_loss=one)
    first, second, first_of_all, second_of_all = after_each_task
    assert torch.equal(first[:2], second[:2]) and torch.equal(first[2:], linear(4, 4).weight[2:])
    assert not torch.equal(second[2:], first[2:])
    assert not torch.equal(first_of_all[:2], second_of_all[:2])  # which forgets


def test_which_logits_are_seen(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(FineTuning):
        def seen_by_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            logits = super().seen_by_loss(logits, targets)
            seen.append(logits.isfinite().any(dim=0))
            return logits

    for classes, numbers in (("all", {4}), ("task", {2}), ("batch", {1, 2})):
        seen.clear()
        trained(tmp_path, Watched, classes_in_loss=classes)
        assert {int(one.sum()) for one in seen} == numbers
    assert not any(one[:2].any() for one in seen[10:])  # of the second task's ten batches


def test_replayed_samples_see_all_classes(tmp_path: Path) -> None:
    for kind in (ExperienceReplay, MaximallyInterferedRetrieval):
        method = kind(Identity(4), linear, 8, optimizer=sgd, classes_in_loss="batch")
        fit(method, tmp_path, stream(batch_size=2))
        x, old_x = torch.randn(3, 4), torch.randn(2, 4)
        targets, old_targets, tasks = torch.tensor([2, 3, 3]), torch.tensor([0, 1]), torch.zeros(3).long()
        loss, logits = method.loss_with_replay((x, targets, tasks), (old_x, old_targets, tasks[:2]))
        new = F.cross_entropy(method(x)[:, 2:], targets - 2)
        torch.testing.assert_close(loss, new + F.cross_entropy(method(old_x), old_targets))
        torch.testing.assert_close(logits, method(x))  # by which accuracy is told: all classes


def test_members_of_an_ensemble(tmp_path: Path) -> None:
    heads = []
    for classes in ("all", "task"):
        method = Ensemble(Identity(4), linear, members=2, optimizer=sgd, classes_in_loss=classes)
        fit(method, tmp_path, stream(batch_size=2))
        heads.append(method.head.members[0].weight.detach())
    torch.testing.assert_close(heads[1], trained(tmp_path, classes_in_loss="task"))
    assert not torch.allclose(*heads)


def test_what_learns_all_classes_together_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes_in_loss=task: JointTraining"):
        JointTraining(Identity(4), linear, classes_in_loss="task")
