"""Elastic weight consolidation and synaptic intelligence, against their formulas worked by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.backbones import Identity
from mh_lightning.errors import UserError
from mh_lightning.methods import EWC, FineTuning, SynapticIntelligence
from mh_lightning.methods.quadratic_penalty import TensorsOfParameters
from tests.methods.test_rivals import CLASSES, FEATURES, accuracies, fit, linear, sgd, stream


def fisher_by_hand(head: Any, x: Tensor, targets: Tensor, exact: bool) -> Tensor:
    """For a linear head, d log p(y) / d W = (1[y] - p) xᵀ."""
    p = head(x).softmax(dim=1)
    own = p * (1 - p) if exact else (F.one_hot(targets, CLASSES) - p).square()
    return own.T @ x.square() / len(x)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_each_step_is_pulled_by_the_fisher_information(fisher: Any, tmp_path: Path) -> None:
    pulled: list[float] = []
    data = stream(batch_size=4, chunk_size=None, epochs_per_task=2)

    class Watched(EWC):
        def on_task_end(self, task: int) -> None:
            inputs, labels = data._splits["train"].features, torch.from_numpy(data._splits["train"].labels)
            assert inputs is not None and self.head is not None
            mine = torch.isin(labels, torch.tensor(data.class_groups[task]))
            expected = fisher_by_hand(self.head, inputs[mine], labels[mine], fisher == "exact").detach()
            before = self.importance["head.weight"].clone()
            super().on_task_end(task)
            torch.testing.assert_close(self.importance["head.weight"], 0.5 * before + expected)
            assert torch.equal(self.anchor["head.weight"], self.head.weight)

        def adjust_gradients(self) -> None:
            assert self.head is not None and self.importance is not None and self.anchor is not None
            plain = self.head.weight.grad.clone()
            super().adjust_gradients()
            pull = 7 * self.importance["head.weight"] * (self.head.weight - self.anchor["head.weight"])
            torch.testing.assert_close(self.head.weight.grad, plain + pull)
            pulled.append(float(pull.detach().abs().max()))

    method = Watched(Identity(FEATURES), linear, penalty=7.0, decay=0.5, fisher=fisher, fisher_samples=None,
                     optimizer=sgd)  # fmt: skip
    fit(method, tmp_path, data)
    assert len(pulled) == 20 and max(pulled[:10]) == 0 and max(pulled[11:]) > 0


def test_a_part_of_the_samples_gives_nearly_the_same_fisher_information(tmp_path: Path) -> None:
    found = []
    for samples in (None, 15, 1):
        method = EWC(Identity(FEATURES), linear, penalty=0.0, fisher_samples=samples, optimizer=sgd)
        fit(method, tmp_path, stream(batch_size=10))
        assert method.importance is not None
        found.append(method.importance["head.weight"])
    assert not torch.equal(found[0], found[1])
    assert (found[1] - found[0]).norm() < 0.2 * found[0].norm() and (found[2] - found[0]).norm() > 0


def test_importance_of_a_path(tmp_path: Path) -> None:
    """What is summed up step by step is what gradients and moves that are noted outside give."""
    gradients: list[list[Tensor]] = [[], []]
    places: list[list[Tensor]] = [[], []]
    ends: list[Tensor] = []

    class Watched(SynapticIntelligence):
        def adjust_gradients(self) -> None:
            assert self.head is not None
            gradients[self.task].append(self.head.weight.grad.clone())
            places[self.task].append(self.head.weight.detach().clone())
            super().adjust_gradients()

        def on_task_end(self, task: int) -> None:
            assert self.head is not None
            places[task].append(self.head.weight.detach().clone())
            super().on_task_end(task)
            assert self.importance is not None
            ends.append(self.importance["head.weight"].clone())

    method = Watched(Identity(FEATURES), linear, penalty=0.7, damping=0.01, optimizer=sgd)
    fit(method, tmp_path, stream(batch_size=5, epochs_per_task=3))
    expected = torch.zeros(CLASSES, FEATURES)
    for task in range(2):
        path = sum(-g * (after - before) for g, before, after in
                   zip(gradients[task], places[task], places[task][1:], strict=False))  # fmt: skip
        moved = places[task][-1] - places[task][0]
        expected = expected + path.clamp_min(0) / (moved.square() + 0.01)
        torch.testing.assert_close(ends[task], expected)
    # the second task's first step: plain gradient descent, and the pull
    step = places[1][0] - places[1][1]
    torch.testing.assert_close(step, 0.1 * gradients[1][0])  # no pull where nothing has moved
    second = places[1][1] - places[1][2]
    pull = 2 * 0.7 * ends[0] * (places[1][1] - places[1][0])
    torch.testing.assert_close(second, 0.1 * (gradients[1][1] + pull))


@pytest.mark.parametrize(("kind", "penalty"), [(EWC, 500.0), (SynapticIntelligence, 5.0)])
def test_what_is_held_is_kept(kind: Any, penalty: float, tmp_path: Path) -> None:
    def weights_after(method: Any) -> Tensor:
        fit(method, tmp_path)
        return method.head.weight.detach()

    plain = FineTuning(Identity(FEATURES), linear, optimizer=sgd)
    free = kind(Identity(FEATURES), linear, penalty=0.0, optimizer=sgd)
    assert torch.equal(weights_after(plain), weights_after(free))
    starts: list[Tensor] = []

    class Held(kind):  # type: ignore[misc]
        def on_task_end(self, task: int) -> None:
            super().on_task_end(task)
            starts.append(self.head.weight.detach().clone())

    small = partial_sgd(1e-3)
    fit(Held(Identity(FEATURES), linear, penalty=penalty, optimizer=small), tmp_path)
    fit(Held(Identity(FEATURES), linear, penalty=0.0, optimizer=small), tmp_path)
    held, moved = starts[1] - starts[0], starts[3] - starts[2]
    assert torch.equal(starts[0], starts[2]) and held.norm() < moved.norm()


def partial_sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def test_the_first_task_is_learnt_as_without_a_penalty(tmp_path: Path) -> None:
    plain = accuracies(FineTuning(Identity(FEATURES), linear, optimizer=sgd), tmp_path)
    assert torch.equal(plain[0], accuracies(EWC(Identity(FEATURES), linear, optimizer=sgd), tmp_path)[0])


def test_tensors_of_grown_parameters() -> None:
    kept = TensorsOfParameters({"head.weight": torch.ones(2, 3)})
    kept.copy_from({"head.weight": torch.ones(2, 3)})
    kept.grow({"head.weight": torch.ones(4, 3)})
    assert kept["head.weight"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(UserError, match=r"head.weight has grown from \(4, 3\) to \(4, 5\)"):
        kept.grow({"head.weight": torch.ones(4, 5)})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EWC, {"penalty": -1.0}, "penalty must be .*at least 0"),
        (EWC, {"decay": 1.5}, "decay must lie in"),
        (EWC, {"fisher": "sampled"}, "fisher must be 'empirical' or 'exact', got 'sampled'"),
        (EWC, {"fisher_samples": 0}, "fisher_samples must be"),
        (SynapticIntelligence, {"penalty": float("inf")}, "penalty must be"),
        (SynapticIntelligence, {"damping": 0.0}, "damping must be"),
    ],
)
def test_refusals(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(Identity(FEATURES), nn.Linear, **options)
