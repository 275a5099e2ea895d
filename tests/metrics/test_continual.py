"""The classes: against the pure functions, against scikit-learn, in parts and in every order."""

import copy
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score
from torch import Tensor
from torchmetrics import MetricCollection

from mh_lightning.errors import UserError
from mh_lightning.metrics import (
    AccuracyMatrix,
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    IncrementalAccuracy,
    LastAccuracy,
    continual_metrics,
)
from mh_lightning.metrics import functional as MF
from tests.metrics.evaluations import assert_same, evaluation, split


def test_accuracy_matrix_by_hand() -> None:
    metric = AccuracyMatrix(3)
    # classes 4 and 3 make the first task, 0 and 1 the second, 2 and 5 the last
    metric.update(torch.tensor([4, 3, 2]), torch.tensor([4, 0, 2]), torch.tensor([0, 1, 2]), after_task=0)
    metric.update(torch.tensor([4, 1]), torch.tensor([3, 1]), torch.tensor([0, 1]), after_task=0)
    metric.update(torch.tensor([5, 5, 5, 2]), torch.tensor([2, 2, 5, 2]), torch.tensor([2, 2, 2, 2]), after_task=2)
    nan = float("nan")
    expected = torch.tensor([[0.5, 0.5, 1.0], [nan, nan, nan], [nan, nan, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(metric.compute(), expected, equal_nan=True)
    assert metric.total.tolist() == [[2, 2, 1], [0, 0, 0], [0, 0, 4]]
    metric.reset()
    assert metric.total.sum() == 0 and metric.correct.sum() == 0


def test_accuracy_matrix_of_one_task_is_a_matrix() -> None:
    metric = AccuracyMatrix(1)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 0]), after_task=0)
    assert metric.compute().tolist() == [[0.5]]


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_classes_follow_functions(num_tasks: int) -> None:
    metrics = {
        AverageAccuracy: lambda matrix, samples: MF.average_accuracy(matrix),
        Forgetting: lambda matrix, samples: MF.forgetting(matrix),
        BackwardTransfer: lambda matrix, samples: MF.backward_transfer(matrix),
        ForwardTransfer: lambda matrix, samples: MF.forward_transfer(matrix),
        LastAccuracy: MF.last_accuracy,
        IncrementalAccuracy: MF.incremental_accuracy,
    }
    evaluations = [evaluation(num_tasks, after) for after in range(num_tasks)]
    for kind, function in metrics.items():
        metric, matrix = kind(num_tasks), AccuracyMatrix(num_tasks)
        for trained, batch in enumerate(evaluations, start=1):
            metric.update(*batch)
            matrix.update(*batch)
            # after task t: what the functions make of the leading (t, t) part and of this evaluation's samples
            samples = torch.bincount(batch.tasks)[:trained]
            accuracies = (matrix.correct / matrix.total.double())[:trained, :trained]
            torch.testing.assert_close(metric.compute(), function(accuracies, samples))


def test_clipped_backward_transfer() -> None:
    for right, expected in ((False, 0.0), (True, 1.0)):
        metric = BackwardTransfer(2, clip=True)
        for after_task, answer in enumerate((not right, right)):
            predictions = torch.tensor([0 if answer else 3, 3])
            metric.update(predictions, torch.tensor([0, 3]), torch.tensor([0, 1]), after_task)
        assert metric.compute() == expected


def test_last_accuracy_is_scikit_learns() -> None:
    metric, batches = LastAccuracy(4), [evaluation(4, after, seed=7, samples=300) for after in range(4)]
    for batch in batches:
        metric.update(*batch)
        seen = batch.tasks <= batch.after_task
        expected = accuracy_score(batch.targets[seen].numpy(), batch.predictions[seen].numpy())
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 17), st.randoms(use_true_random=False), st.integers(0, 99))
def test_batches_in_any_order_and_split(num_tasks: int, size: int, shuffler: random.Random, seed: int) -> None:
    whole, parts = continual_metrics(num_tasks), continual_metrics(num_tasks)
    batches = []
    for after_task in range(num_tasks):
        batch = evaluation(num_tasks, after_task, seed)
        whole.update(*batch)
        batches += split(batch, size)
    shuffler.shuffle(batches)
    for batch in batches:
        parts.update(*batch)
    assert_same(parts.compute(), whole.compute())


def test_states_of_parts_sum_up() -> None:
    first, second, whole = AccuracyMatrix(3), AccuracyMatrix(3), AccuracyMatrix(3)
    for after_task in range(3):
        batch = evaluation(3, after_task)
        for metric, part in zip((first, second), split(batch, 40), strict=True):
            metric.update(*part)
        whole.update(*batch)
    assert torch.equal(first.correct + second.correct, whole.correct) and whole.correct.sum() > 0
    assert torch.equal(first.total + second.total, whole.total) and whole.total.dtype == torch.long


def alone(num_tasks: int, evaluations: int) -> dict[str, Tensor]:
    """The members one by one, without compute groups."""
    members: dict[str, AccuracyMatrix] = {
        "accuracy_matrix": AccuracyMatrix(num_tasks),
        "average_accuracy": AverageAccuracy(num_tasks),
        "forgetting": Forgetting(num_tasks),
        "backward_transfer": BackwardTransfer(num_tasks),
        "backward_transfer_clipped": BackwardTransfer(num_tasks, clip=True),
        "forward_transfer": ForwardTransfer(num_tasks),
        "last_accuracy": LastAccuracy(num_tasks),
        "incremental_accuracy": IncrementalAccuracy(num_tasks),
    }
    for after_task in range(evaluations):
        for member in members.values():
            member.update(*evaluation(num_tasks, after_task))
    return {name: member.compute() for name, member in members.items()}


def evaluate(collection: MetricCollection, num_tasks: int, after_task: int) -> dict[str, Tensor]:
    """One evaluation as the callback makes it: batches, then results, then a look at the counts."""
    for batch in split(evaluation(num_tasks, after_task), 16):
        collection.update(*batch)
    results = collection.compute()
    counts = collection["accuracy_matrix"]
    assert counts.total[after_task].sum() == len(evaluation(num_tasks, after_task).tasks)
    return results


def test_collection_over_several_evaluations() -> None:
    collection = continual_metrics(3)
    assert len(collection.compute_groups) == 1
    for after_task in range(3):
        assert_same(evaluate(collection, 3, after_task), alone(3, after_task + 1))
    assert_same(collection.compute(), alone(3, 3))


@pytest.mark.parametrize("duplicate", [lambda metrics: pickle.loads(pickle.dumps(metrics)), copy.deepcopy])
def test_copies_go_on(duplicate) -> None:
    collection = continual_metrics(3)
    evaluate(collection, 3, 0)
    other = duplicate(collection)
    assert_same(other.compute(), alone(3, 1))
    for after_task in (1, 2):
        evaluate(other, 3, after_task)
    assert_same(other.compute(), alone(3, 3))
    assert_same(collection.compute(), alone(3, 1))


def test_state_dict() -> None:
    collection, other = continual_metrics(3), continual_metrics(3)
    evaluate(collection, 3, 0)
    collection.persistent(True)
    other.persistent(True)
    other.load_state_dict(collection.state_dict())
    for member in other.values(copy_state=False):
        assert torch.equal(member.total, collection["accuracy_matrix"].total) and member.total.sum() > 0
    for after_task in (1, 2):
        evaluate(other, 3, after_task)
    assert_same(other.compute(), alone(3, 3))


def test_counts_of_a_checkpoint_go_on() -> None:
    collection, resumed = continual_metrics(3), continual_metrics(3)
    evaluate(collection, 3, 0)
    counts = {name: getattr(collection["accuracy_matrix"], name) for name in ("correct", "total")}
    for metric in resumed.values(copy_state=False):
        for name, count in counts.items():
            setattr(metric, name, count.clone())
        metric._update_count = 1
    for after_task in (1, 2):
        evaluate(resumed, 3, after_task)
    assert_same(resumed.compute(), alone(3, 3))


@pytest.mark.parametrize(
    "kind", [AverageAccuracy, Forgetting, BackwardTransfer, ForwardTransfer, LastAccuracy, IncrementalAccuracy]
)
def test_evaluation_that_misses_a_seen_task(kind: type[AccuracyMatrix]) -> None:
    def refused(metric: AccuracyMatrix) -> None:
        metric._update_count = 1
        with pytest.raises(UserError, match=f"^{kind.__name__}: .*all tasks, those to come included") as caught:
            metric.compute()
        assert "\n" not in str(caught.value)

    refused(kind(2))  # no evaluation at all
    no_first, no_second, gap = kind(2), kind(3), kind(3)
    no_first.update(torch.tensor([2]), torch.tensor([2]), torch.tensor([1]), after_task=0)
    refused(no_first)
    for after_task in (0, 1):
        batch = evaluation(3, after_task)
        keep = (batch.tasks != 1) if after_task else batch.tasks >= 0
        no_second.update(*(tensor[keep] for tensor in batch[:3]), after_task)
    refused(no_second)
    for after_task in (0, 2):  # nothing after the second task
        gap.update(*evaluation(3, after_task))
    refused(gap)
