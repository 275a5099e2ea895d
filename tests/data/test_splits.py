"""Dividing samples among training, validation and test."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.splits import (
    Splits,
    concatenate,
    draw_stratified,
    first_half,
    one_domain_a_perturbation,
    split_anew,
    split_as_asked,
)
from tests.data.refusal import refused


def numbered(labels: list[int], start: int = 0, domains: list[int] | None = None) -> Labelled:
    """Each sample is its own number."""
    inputs = torch.arange(start, start + len(labels)).float().view(-1, 1)
    return Labelled(inputs, np.array(labels), None if domains is None else np.array(domains))


def numbers(samples: Labelled | None) -> list[int]:
    assert samples is not None
    return samples.inputs.flatten().int().tolist()


def test_each_class_is_cut_in_order() -> None:
    """Class 0 is at 0, 2, 4, ..., 18, class 1 at the odd numbers; both have ten samples."""
    train, validation, test = numbered([0, 1] * 5), numbered([0, 1] * 2, 10), numbered([0, 1] * 3, 14)
    splits = split_anew(Splits(train, test, ["a", "b"], validation), [0.7, 0.1, 0.2])
    assert numbers(splits.train) == list(range(14))
    assert numbers(splits.validation) == [14, 15] and numbers(splits.test) == [16, 17, 18, 19]
    assert splits.test.labels.tolist() == [0, 1, 0, 1] and splits.class_names == ["a", "b"]
    whole = split_anew(Splits(train, None, ["a", "b"]), [0.6, 0, 0.4])
    assert numbers(whole.train) == list(range(6)) and numbers(whole.test) == [6, 7, 8, 9]
    assert whole.validation is None


def test_domains_go_along() -> None:
    samples = numbered([0, 0, 1, 1] * 4, domains=[0, 1] * 8)  # each kind has four samples, one in each four
    splits = split_anew(Splits(samples, None, ["a", "b"]), [0.5, 0.25, 0.25])
    assert splits.train.domains.tolist() == [0, 1] * 4 and numbers(splits.train) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert numbers(splits.validation) == [8, 9, 10, 11] and numbers(splits.test) == [12, 13, 14, 15]
    assert splits.validation.domains.tolist() == splits.test.domains.tolist() == [0, 1, 0, 1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.integers(0, 9), st.integers(1, 10))
def test_each_sample_is_in_one_split(labels: list[int], validation: int, train: int) -> None:
    if train + validation >= 10:
        validation, train = 0, 5
    fractions = [train / 10, validation / 10, 1 - train / 10 - validation / 10]
    data = Splits(numbered(labels), None, list("abcd"))
    counts = [labels.count(label) for label in sorted(set(labels))]
    rounded = [np.diff([0, round(n * fractions[0]), round(n * sum(fractions[:2])), n]) for n in counts]
    if any(fraction and 0 in sizes for fraction, sizes in zip(fractions, np.transpose(rounded), strict=True)):
        refused(lambda: split_anew(data, fractions), "data.split_fractions", "sample of class")
        return
    splits = split_anew(data, fractions)
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    assert sorted(number for part in parts for number in numbers(part)) == list(range(len(labels)))
    for part in parts:
        assert part.labels.tolist() == [labels[number] for number in numbers(part)]
    assert len(parts) == 2 + (validation > 0)
    for label in set(labels):
        assert all(label in part.labels for part in parts)
        assert abs((splits.train.labels == label).sum() - labels.count(label) * fractions[0]) <= 0.5


def test_a_class_that_would_be_missing_in_a_split_is_named() -> None:
    """Its two samples would be one of training and one of validation."""
    samples = numbered([0] * 10 + [1] * 2)
    refused(lambda: split_anew(Splits(samples, None, ["a", "rare"]), [0.7, 0.1, 0.2]),
            "data.split_fractions=[0.7, 0.1, 0.2]", "no test sample of class 'rare', which has 2")  # fmt: skip


@pytest.mark.parametrize(
    "fractions",
    [[0.7, 0.3], [0.7, 0.1, 0.1], [0.8, -0.1, 0.3], [1, 0, 0], [0, 0.5, 0.5], [], [float("nan"), 0.5, 0.5], [1, 1, 1]],
)
def test_refused_fractions(fractions: list[float]) -> None:
    samples = numbered([0] * 10)
    refused(lambda: split_anew(Splits(samples, samples, ["0"]), fractions), "data.split_fractions", str(fractions))


def test_concatenate() -> None:
    tensors = concatenate([numbered([0, 1]), numbered([1], 2)])
    assert numbers(tensors) == [0, 1, 2] and tensors.labels.tolist() == [0, 1, 1] and tensors.domains is None
    paths = concatenate([Labelled(["a"], np.array([1])), Labelled(["b", "c"], np.array([0, 2]))])
    assert list(paths.inputs) == ["a", "b", "c"] and paths.labels.tolist() == [1, 0, 2]
    domains = concatenate([numbered([0], domains=[3]), numbered([1], 1, domains=[5])])
    assert domains.domains.tolist() == [3, 5]


def test_one_domain_a_perturbation() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1)
    thrice = one_domain_a_perturbation(Labelled(images, np.array([5, 6, 7])), 3)
    assert [int(image) for image in thrice.inputs] == [0, 1, 2] * 3
    assert thrice.labels.tolist() == [5, 6, 7] * 3 and thrice.domains.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert isinstance(thrice.inputs, Rows) and thrice.inputs.source is images
    refused(lambda: one_domain_a_perturbation(thrice, 2), "data.perturbations", "its own")
    refused(lambda: one_domain_a_perturbation(numbered([0]), 2), "data.perturbations", "floating-point")


def test_first_half_of_the_tasks() -> None:
    samples = numbered([0, 1, 2] * 2)
    tasks = [np.array([2, 5]), np.array([1, 4]), np.array([0, 3])]
    assert numbers(first_half(samples, tasks)) == [2, 5]
    assert numbers(first_half(samples, [*tasks[:2], *tasks[1:]])) == [1, 2, 4, 5]


def test_half_of_a_single_task() -> None:
    half = numbers(first_half(numbered([0] * 9), [np.arange(9)]))
    assert half == np.random.RandomState(1234).permutation(9)[:4].tolist()
    assert numbers(first_half(numbered([0]), [np.arange(1)])) == [0]


def test_stratified_draw() -> None:
    samples = numbered([0] * 20 + [1] * 10, domains=[0, 1] * 15)
    kept, drawn = draw_stratified(samples, 6, 0, "max_train_samples", "ab")
    assert sorted([*kept, *drawn]) == list(range(30)) and drawn.tolist() == sorted(drawn)
    for seed in range(10):
        drawn = draw_stratified(samples, 6, seed, "max_train_samples", "ab")[1]
        assert np.bincount(samples.labels[drawn] * 2 + samples.domains[drawn]).tolist() == [2, 2, 1, 1]
    assert draw_stratified(samples, 6, 0, "max_train_samples", "ab")[1].tolist() != drawn.tolist()
    refused(
        lambda: draw_stratified(samples, 1, 0, "max_test_samples", "ab"),
        "data.max_test_samples=1", "30 samples", "class 'b' of domain 1", "draw 4 to 26",
    )  # fmt: skip


def drawn_of(counts: list[int], size: int | float, seed: int = 0) -> list[list[int]]:
    """How many of each class are left, and drawn."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = draw_stratified(numbered(labels.tolist()), size, seed, "max_train_samples", "abcdefghij")
    assert sorted(np.concatenate(parts)) == list(range(sum(counts)))
    return [np.bincount(labels[part], minlength=len(counts)).tolist() for part in parts]


def test_rare_classes_are_drawn() -> None:
    for seed in range(5):
        assert drawn_of([100, 100, 100, 2], 20, seed)[1] in ([7, 6, 6, 1], [6, 7, 6, 1], [6, 6, 7, 1])
    assert drawn_of([100, 2, 2, 2, 2], 5) == [[99, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert drawn_of([100, 2, 2, 2, 2], 103) == [[1, 1, 1, 1, 1], [99, 1, 1, 1, 1]]
    assert drawn_of([100, 2], 0.02) == [[98, 1], [2, 1]]
    assert drawn_of([100, 2], 0.98) == [[1, 1], [99, 1]]
    assert drawn_of([2] * 4, 0.5) == [[1] * 4, [1] * 4]
    ties = {tuple(drawn_of([3] * 10, 15, seed)[1]) for seed in range(5)}
    assert len(ties) > 1 and all(set(sizes) == {1, 2} for sizes in ties)


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.data())
def test_draws_are_in_proportion(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(len(counts), sum(counts) - len(counts)))
    left, drawn = drawn_of(counts, size)
    assert sum(drawn) == size and min(drawn) >= 1 and min(left) >= 1
    wanted = [count * size / sum(counts) for count in counts]
    if all(1 <= part <= count - 1 for count, part in zip(counts, wanted, strict=True)):
        assert all(abs(got - part) < 1 for got, part in zip(drawn, wanted, strict=True))


@pytest.mark.parametrize(("counts", "size"), [([60] * 10, 200), ([70, 140, 35], 0.2)])
def test_draws_without_rounding_are_those_of_scikit_learn(counts: list[int], size: int | float) -> None:
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(len(counts)), counts))
    expected = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=7)
    parts = draw_stratified(numbered(labels.tolist()), size, 7, "validation_fraction", "abcdefghij")
    assert [part.tolist() for part in parts] == [sorted(part) for part in expected]


def test_draws_without_a_class_are_refused() -> None:
    for counts, size, mend in (
        ([9, 9, 3], 2, "draw 3 to 18"),
        ([9, 9, 3], 0.05, "draw 3 to 18"),
        ([9, 9, 3], 19, "draw 3 to 18"),
        ([9, 9, 1], 5, "add samples of it"),
    ):
        message = refused(lambda c=counts, s=size: drawn_of(c, s), f"data.max_train_samples={size} draws", mend)
        assert f"class 'c', which has {counts[2]}, would be missing" in message


def test_options_that_draw_keep_rare_classes() -> None:
    train = numbered([0] * 100 + [1] * 100 + [2] * 100 + [3] * 2)
    test = numbered([0] * 50 + [1] * 50 + [2] * 50 + [3] * 2)
    options = {"split_fractions": None, "validation_tasks": "all", "split_seed": 3, "validation_fraction": 0.01}
    splits = split_as_asked(
        Splits(train, test, ["a", "b", "c", "rare"]), (), max_train_samples=None, max_test_samples=7, **options
    )
    assert np.bincount(splits["test"].labels).tolist() == [2, 2, 2, 1]
    assert np.bincount(splits["validation"].labels).tolist() == [1, 1, 1, 1]
    assert np.bincount(splits["train"].labels).tolist() == [99, 99, 99, 1]
    asked = {"max_train_samples": 20, "max_test_samples": None, **options}
    refused(
        lambda: split_as_asked(Splits(train, test, ["a", "b", "c", "rare"]), (), **asked),
        "data.validation_fraction=0.01", "class 'rare', which has 1, would be missing",
    )  # fmt: skip


def test_split_anew_cuts_each_domain_alike() -> None:
    labels, domains = np.zeros(40, dtype=np.int64), np.repeat([0, 1], 20)
    splits = split_anew(Splits(Labelled(torch.zeros(40, 1), labels, domains), None, ["0"]), [0.7, 0.1, 0.2])
    assert splits.validation is not None and splits.test is not None
    for part, size in ((splits.train, 14), (splits.validation, 2), (splits.test, 4)):
        assert np.bincount(part.domain_of_sample).tolist() == [size, size]
