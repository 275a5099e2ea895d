"""The classes: against the pure functions, against scikit-learn, in parts and in every order."""

import copy
import pickle
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import Tensor
from torchmetrics import MetricCollection

from mh_lightning.errors import UserError
from mh_lightning.metrics import (
    METRICS,
    AccuracyMatrix,
    ContinualMetric,
    Evaluations,
    TaskIncrementalAccuracy,
    continual_metrics,
    functional,
)
from tests.metrics.evaluations import assert_same, evaluation, outputs, split


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
        "average_accuracy": lambda matrix, samples: functional.average_accuracy(matrix),
        "forgetting": lambda matrix, samples: functional.forgetting(matrix),
        "backward_transfer": lambda matrix, samples: functional.backward_transfer(matrix),
        "forward_transfer": lambda matrix, samples: functional.forward_transfer(matrix, untrained[: len(matrix)]),
        "all_pairs_backward_transfer": lambda matrix, samples: functional.all_pairs_backward_transfer(matrix),
        "all_pairs_forward_transfer": lambda matrix, samples: functional.all_pairs_forward_transfer(matrix),
        "last_accuracy": functional.last_accuracy,
        "last_accuracy_old": functional.last_accuracy_old,
        "last_accuracy_new": lambda matrix, samples: functional.last_accuracy_new(matrix),
        "incremental_accuracy": functional.incremental_accuracy,
    }
    evaluations = [evaluation(num_tasks, after) for after in range(num_tasks)]
    before = evaluation(num_tasks, -1)
    right = torch.bincount(before.tasks[before.predictions[:, 0] == before.targets], minlength=num_tasks)
    untrained = right / torch.bincount(before.tasks).double()
    for kind, function in metrics.items():
        metric, matrix = ContinualMetric(kind, num_tasks), AccuracyMatrix(num_tasks)
        metric.update(*before)
        for trained, batch in enumerate(evaluations, start=1):
            metric.update(*batch)
            matrix.update(*batch)
            # after task t: what the functions make of the leading (t, t) part and of this evaluation's samples
            samples = torch.bincount(batch.tasks)[:trained]
            accuracies = (matrix.correct / matrix.total.double())[:trained, :trained]
            torch.testing.assert_close(metric.compute(), function(accuracies, samples), equal_nan=True)


def test_clipped_all_pairs_backward_transfer() -> None:
    for right, expected in ((False, 0.0), (True, 1.0)):
        metric = ContinualMetric("all_pairs_backward_transfer_clipped", 2)
        for after_task, answer in enumerate((not right, right)):
            predictions = torch.tensor([0 if answer else 3, 3])
            metric.update(predictions, torch.tensor([0, 3]), torch.tensor([0, 1]), after_task)
        assert metric.compute() == expected


def test_forward_transfer_needs_the_untrained_model() -> None:
    without, later, measured = (continual_metrics(3) for _ in range(3))
    later.update(*evaluation(3, 0))
    for metrics in (measured, later):
        metrics.update(*evaluation(3, -1))  # counts wherever it comes
    for after_task in range(3):
        without.update(*evaluation(3, after_task))
        measured.update(*evaluation(3, after_task))
        if after_task:
            later.update(*evaluation(3, after_task))
        unknown, known, same = (metrics.compute() for metrics in (without, measured, later))
        assert unknown["forward_transfer"].isnan()
        assert known["forward_transfer"] == same["forward_transfer"] and not known["forward_transfer"].isnan()
        for name in known.keys() - {"forward_transfer"}:
            torch.testing.assert_close(known[name], unknown[name], rtol=0, atol=0, equal_nan=True)


def test_last_accuracy_is_scikit_learns() -> None:
    metric, batches = (
        ContinualMetric("last_accuracy", 4),
        [evaluation(4, after, seed=7, samples=300) for after in range(4)],
    )
    for batch in batches:
        metric.update(*batch)
        seen = batch.tasks <= batch.after_task
        expected = accuracy_score(batch.targets[seen].numpy(), batch.predictions[seen, 0].numpy())
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99))
def test_top5_is_scikit_learns_and_no_less_than_top1(num_tasks: int, seed: int) -> None:
    metrics, expected = continual_metrics(num_tasks, with_top5=True), []
    generator = torch.Generator().manual_seed(seed)
    logits, targets, tasks = outputs(num_tasks, 0, seed)
    for after_task in range(num_tasks):
        logits += after_task * torch.rand(logits.shape, generator=generator)
        metrics.update(functional.most_likely(logits, 5), targets, tasks, after_task)
        seen, classes = tasks <= after_task, range(logits.shape[1])
        expected.append(top_k_accuracy_score(targets[seen].numpy(), logits[seen].numpy(), k=5, labels=classes))
        found = metrics.compute()
        assert found["last_accuracy_top5"].item() == pytest.approx(expected[-1], abs=1e-12)
        assert found["incremental_accuracy_top5"].item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)
        for name in ("last_accuracy", "incremental_accuracy"):
            assert found[f"{name}_top5"] >= found[name]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 99))
def test_old_and_new_weigh_together_to_all_seen(num_tasks: int, seed: int) -> None:
    metrics = continual_metrics(num_tasks, with_top5=True)
    for after_task in range(num_tasks):
        batch = evaluation(num_tasks, after_task, seed)
        metrics.update(*batch)
        found = metrics.compute()
        if after_task == 0:
            assert found["last_accuracy_old"].isnan() and found["last_accuracy_new"] == found["last_accuracy"]
            continue
        old, new = int((batch.tasks < after_task).sum()), int((batch.tasks == after_task).sum())
        together = old * found["last_accuracy_old"] + new * found["last_accuracy_new"]
        assert together.item() == pytest.approx((old + new) * found["last_accuracy"].item(), abs=1e-9)


def test_top_k_by_hand() -> None:
    ranked = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    for top_k, correct in ((1, 1), (2, 2), (3, 3)):
        metric = AccuracyMatrix(1, top_k=top_k)
        metric.update(ranked, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), after_task=0)
        assert metric.correct.item() == correct and metric.total.item() == 3


def test_too_few_predictions_are_refused() -> None:
    for predictions, got in ((torch.tensor([0]), 1), (torch.tensor([[0, 1]]), 2)):
        with pytest.raises(UserError, match=f"^last_accuracy: top_k=5 .* got {got}"):
            ContinualMetric("last_accuracy", 1, top_k=5).update(
                predictions, torch.tensor([0]), torch.tensor([0]), after_task=0
            )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 17), st.randoms(use_true_random=False), st.integers(0, 99))
def test_batches_in_any_order_and_split(num_tasks: int, size: int, shuffler: random.Random, seed: int) -> None:
    whole, parts = continual_metrics(num_tasks, with_top5=True), continual_metrics(num_tasks, with_top5=True)
    batches = []
    for after_task in range(-1, num_tasks):
        batch = evaluation(num_tasks, after_task, seed)
        whole.update(*batch)
        batches += split(batch, size)
    shuffler.shuffle(batches)
    for batch in batches:
        parts.update(*batch)
    assert_same(parts.compute(), whole.compute())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 99))
def test_spaced_evaluations_follow_functions(num_tasks: int, every: int, seed: int) -> None:
    spaced, full = (continual_metrics(num_tasks, with_top5=True, every_n_tasks=n) for n in (every, 1))
    rows: list[int] = []
    for metrics in (spaced, full):
        metrics.update(*evaluation(num_tasks, -1, seed))
    for after_task in range(num_tasks):
        batch = evaluation(num_tasks, after_task, seed)
        full.update(*batch)
        if (after_task + 1) % every and after_task + 1 < num_tasks:
            continue
        spaced.update(*batch)
        rows.append(after_task)
        after, seen = [row + 1 for row in rows], after_task + 1
        whole, found = full.compute()["accuracy_matrix"], spaced.compute()
        assert torch.equal(found["accuracy_matrix"][: len(rows)], whole[rows])
        assert found["accuracy_matrix"][len(rows) :].isnan().all()
        matrix, samples = whole[rows, :seen], torch.bincount(batch.tasks)[:seen]
        expected = {
            "forgetting": functional.forgetting(matrix, after),
            "backward_transfer": functional.backward_transfer(matrix, after),
            "forward_transfer": functional.forward_transfer(
                matrix, spaced["accuracy_matrix"].untrained()[:seen], after
            ),
            "all_pairs_backward_transfer": functional.all_pairs_backward_transfer(matrix, after=after),
            "all_pairs_forward_transfer": functional.all_pairs_forward_transfer(matrix, after),
            "last_accuracy_old": functional.last_accuracy_old(matrix, samples, after),
            "last_accuracy_new": functional.last_accuracy_new(matrix, after),
            "incremental_accuracy": functional.incremental_accuracy(matrix, samples, after),
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert spaced["accuracy_matrix"].total.shape == (len(rows), num_tasks)


def test_evaluations_that_are_left_out_are_refused() -> None:
    metric = AccuracyMatrix(5, every_n_tasks=2)
    with pytest.raises(UserError, match="every_n_tasks=2 leaves out an evaluation after task 3 of 5"):
        metric.update(*evaluation(5, 2))
    assert metric.total.sum() == 0


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
        "average_accuracy": ContinualMetric("average_accuracy", num_tasks),
        "forgetting": ContinualMetric("forgetting", num_tasks),
        "backward_transfer": ContinualMetric("backward_transfer", num_tasks),
        "forward_transfer": ContinualMetric("forward_transfer", num_tasks),
        "all_pairs_backward_transfer": ContinualMetric("all_pairs_backward_transfer", num_tasks),
        "all_pairs_backward_transfer_clipped": ContinualMetric("all_pairs_backward_transfer_clipped", num_tasks),
        "all_pairs_forward_transfer": ContinualMetric("all_pairs_forward_transfer", num_tasks),
        "last_accuracy": ContinualMetric("last_accuracy", num_tasks),
        "last_accuracy_old": ContinualMetric("last_accuracy_old", num_tasks),
        "last_accuracy_new": ContinualMetric("last_accuracy_new", num_tasks),
        "incremental_accuracy": ContinualMetric("incremental_accuracy", num_tasks),
        "last_accuracy_top5": ContinualMetric("last_accuracy", num_tasks, top_k=5),
        "incremental_accuracy_top5": ContinualMetric("incremental_accuracy", num_tasks, top_k=5),
    }
    for after_task in range(-1, evaluations):
        for member in members.values():
            member.update(*evaluation(num_tasks, after_task))
    return {name: member.compute() for name, member in members.items()}


def evaluate(collection: MetricCollection, num_tasks: int, after_task: int) -> dict[str, Tensor]:
    """One evaluation as the callback makes it: batches, then results, then a look at the counts."""
    before = [evaluation(num_tasks, -1)] if after_task == 0 else []
    for whole in (*before, evaluation(num_tasks, after_task)):
        for batch in split(whole, 16):
            collection.update(*batch)
    results = collection.compute()
    counts = collection["accuracy_matrix"]
    assert counts.total[after_task].sum() == len(evaluation(num_tasks, after_task).tasks)
    return results


def test_collection_over_several_evaluations() -> None:
    collection = continual_metrics(3, with_top5=True)
    assert len(collection.compute_groups) == 2
    for after_task in range(3):
        assert_same(evaluate(collection, 3, after_task), alone(3, after_task + 1))
    assert_same(collection.compute(), alone(3, 3))


@pytest.mark.parametrize("duplicate", [lambda metrics: pickle.loads(pickle.dumps(metrics)), copy.deepcopy])
def test_copies_go_on(duplicate) -> None:
    collection = continual_metrics(3, with_top5=True)
    evaluate(collection, 3, 0)
    other = duplicate(collection)
    assert_same(other.compute(), alone(3, 1))
    for after_task in (1, 2):
        evaluate(other, 3, after_task)
    assert_same(other.compute(), alone(3, 3))
    assert_same(collection.compute(), alone(3, 1))


def test_state_dict() -> None:
    collection, other = continual_metrics(3, with_top5=True), continual_metrics(3, with_top5=True)
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
    collection, resumed = continual_metrics(3, with_top5=True), continual_metrics(3, with_top5=True)
    evaluate(collection, 3, 0)
    for name, metric in resumed.items(copy_state=False):
        for count in ("correct", "total", "untrained_correct", "untrained_total"):
            setattr(metric, count, getattr(collection[name], count).clone())
        metric._update_count = 1
    for after_task in (1, 2):
        evaluate(resumed, 3, after_task)
    assert_same(resumed.compute(), alone(3, 3))


@pytest.mark.parametrize("name", METRICS)
def test_evaluation_that_misses_a_seen_task(name: str) -> None:
    kind = partial(ContinualMetric, name)

    def refused(metric: AccuracyMatrix) -> None:
        metric._update_count = 1
        with pytest.raises(UserError, match=f"^{name}: .*all tasks, those to come included") as caught:
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


def test_a_metric_of_ones_own() -> None:
    def gap(seen: Evaluations) -> float:
        """Between the best and the worst task."""
        assert seen.matrix.shape == (len(seen.after), len(seen.samples)) and seen.untrained.shape == seen.samples.shape
        return float(seen.matrix[-1].max() - seen.matrix[-1].min())

    metrics = continual_metrics(3, extra={"gap": gap})
    for after_task in range(3):
        metrics.update(*evaluation(3, after_task))
    found = metrics.compute()
    row = found["accuracy_matrix"][-1]
    assert found["gap"] == row.max() - row.min() and found["gap"] > 0
    alone = ContinualMetric(lambda seen: seen.matrix, 1)
    alone.update(*evaluation(1, 0))
    assert alone.compute().ndim == 0  # of a single entry
    several = ContinualMetric(lambda seen: seen.matrix[-1], 2)
    for after_task in range(2):
        several.update(*evaluation(2, after_task))
    with pytest.raises(UserError, match="must give one number, got a tensor of shape \\(2,\\)"):
        several.compute()


@pytest.mark.parametrize("name", ["forgetting", "seconds", "accuracy_matrix", "a/b", ""])
def test_names_that_are_taken_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^extra: {name!r} cannot name a metric"):
        continual_metrics(2, extra={name: lambda seen: 0.0})
    with pytest.raises(UserError, match=r"metric='nonsense' is none of average_accuracy, "):
        ContinualMetric("nonsense", 2)


def test_task_incremental_accuracy_by_hand() -> None:
    groups, logits = [[0, 2], [1, 3], [0, 1]], torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    tasks = torch.arange(60) % 3
    targets = torch.tensor([groups[task][place // 3 % 2] for place, task in enumerate(tasks.tolist())])
    metric = TaskIncrementalAccuracy(groups, num_classes=4)
    for after_task in range(3):
        for part in zip(logits.split(7), targets.split(7), tasks.split(7), strict=True):
            metric.update(*part, after_task=after_task)
    right = [[] for _ in groups]
    for row, target, task in zip(logits.tolist(), targets.tolist(), tasks.tolist(), strict=True):
        right[task].append(max(groups[task], key=lambda label: row[label]) == target)
    expected = sum(sum(one) / len(one) for one in right) / 3
    assert metric.compute().item() == pytest.approx(expected)
    joint = TaskIncrementalAccuracy([[0, 1, 2, 3]] * 3, num_classes=4)
    plain = ContinualMetric("average_accuracy", num_tasks=3)
    for after_task in range(3):
        joint.update(logits, targets, tasks, after_task)
        plain.update(logits.argmax(dim=1), targets, tasks, after_task)
    assert torch.equal(joint.compute(), plain.compute())
