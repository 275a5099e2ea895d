"""Probabilities: temperatures against a search, answers to samples left out against regressions without them."""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    KernelMemoryUnits,
    RandomProjectionRidge,
    RidgeRegression,
)
from mh_lightning.heads.base import ROWS
from mh_lightning.heads.temperature import PROBES, Probes, best_temperature, left_out
from tests.blobs import CLASSES, FEATURES, blobs
from tests.heads.test_base import EVERY

every_head = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def noisy(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes that overlap, and a tenth of the labels is of any class."""
    x, targets = blobs(samples, seed)
    generator = torch.Generator().manual_seed(seed)
    x = x + torch.randn(x.shape, generator=generator)
    wrong = torch.rand(samples, generator=generator) < 0.1
    return x, torch.where(wrong, torch.randint(CLASSES, (samples,), generator=generator), targets)


def test_an_answer_left_out_is_that_of_the_regression_without_the_sample() -> None:
    x, targets = blobs(40, 1)
    x, y = x.double(), F.one_hot(targets, CLASSES).double()
    penalty = 0.7 * torch.eye(FEATURES, dtype=torch.float64)
    hat = x @ torch.linalg.solve(x.T @ x + penalty, x.T)
    found = left_out(hat @ y, y, hat.diagonal())
    for place in range(len(x)):
        others = torch.arange(len(x)) != place
        weights = torch.linalg.solve(x[others].T @ x[others] + penalty, x[others].T @ y[others])
        torch.testing.assert_close(found[place], x[place] @ weights)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_temperature_is_the_best_of_many(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(300, 4, generator=generator)
    classes = (3 * answers + torch.randn(300, 4, generator=generator)).argmax(dim=1)
    grid = [scale * 10 ** (step / 100) for step in range(-300, 200)]
    best = min(grid, key=lambda one: float(F.cross_entropy(scale * answers / one, classes, label_smoothing=1 / 301)))
    assert best_temperature(scale * answers, classes) == pytest.approx(best, rel=0.03)


def test_what_tells_nothing_leaves_the_temperature_1() -> None:
    alike, one_class = torch.ones(5, 3), torch.rand(5, 1)
    for answers in (alike, one_class, torch.zeros(0, 3), alike * torch.nan):
        assert best_temperature(answers, torch.zeros(len(answers), dtype=torch.long)) == 1
    right = torch.eye(3).repeat(9, 1)
    assert 0.05 < best_temperature(right, right.argmax(dim=1)) < 1  # above 0, although all are right


def test_probes_are_drawn_alike_from_the_whole_stream_whatever_the_batches() -> None:
    x, targets = torch.stack([torch.arange(4000.0) // 64, torch.arange(4000.0) % 64], dim=1), torch.arange(4000) % 7
    one, many = Probes(2), Probes(2)
    one.add(x, targets)
    for batch in zip(x.split(97), targets.split(97), strict=True):
        many.add(*batch)
    torch.testing.assert_close(one.state_dict(), many.state_dict())
    places = one.features.float() @ torch.tensor([64.0, 1.0])
    assert len(places.unique()) == PROBES and abs(float(places.mean()) - 2000) < 5 * 4000 / 12**0.5 / PROBES**0.5
    few = Probes(2)
    few.add(x[:3], targets[:3])
    assert few.kept()[0][:, 1].tolist() == [0, 1, 2] and few.kept()[1].tolist() == [0, 1, 2]


@every_head
def test_probabilities_can_be_believed(make: Callable[[], ClosedFormHead]) -> None:
    head = make()
    x, targets = noisy(3000, 1)
    head.update(x[targets != 2], targets[targets != 2])
    queries, wanted = noisy(3000, 2)
    queries, wanted = queries[wanted != 2], wanted[wanted != 2]
    probabilities = head.probabilities(queries)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(queries)))
    assert bool((probabilities[:, 2] == 0).all())
    assert torch.equal(probabilities.argmax(dim=1), head(queries).argmax(dim=1))
    error = multiclass_calibration_error(probabilities, wanted, CLASSES, n_bins=15)
    assert float(error) < 0.06
    own = float(F.cross_entropy(head.calibrated(queries), wanted))
    others = [float(F.cross_entropy(head(queries) / (head.temperature * factor), wanted)) for factor in (0.5, 2)]
    assert own < min(others)


def test_samples_that_a_head_has_by_heart_do_not_make_it_sure() -> None:
    x, targets = noisy(700, 1)
    head = KernelMemoryUnits(FEATURES, CLASSES, max_bytes=1_000_000, seed=0)
    head.update(x, targets)
    queries, wanted = noisy(2000, 2)
    learnt, new = (float(F.cross_entropy(head.calibrated(a), b)) for a, b in ((x, targets), (queries, wanted)))
    assert (
        learnt
        < new
        < 1.1
        * min(float(F.cross_entropy(head(queries) / temperature, wanted)) for temperature in torch.logspace(-3, 1, 200))
    )


def test_a_temperature_is_found_anew_after_new_samples_and_not_for_those_that_wait_for_nothing() -> None:
    head = RidgeRegression(FEATURES, CLASSES)
    assert head.temperature == 1
    x, targets = noisy(300, 1)
    head.update(x, targets)
    first = head.temperature
    head.update(-x, targets)
    assert head.temperature != first
    again = RidgeRegression(FEATURES, CLASSES)
    again.load_state_dict(head.state_dict())
    assert again.temperature == head.temperature


def test_cheap_predictions_find_no_temperature() -> None:
    head = ClassMeans(FEATURES, CLASSES)
    x, targets = blobs(ROWS, 1)
    head.update(x, targets)
    head(x)
    assert head._temperature is None


@pytest.mark.parametrize("normalization", ["sqrt", "l2", "none"])
def test_no_sample_s_leverage_decides_on_real_data(normalization: str) -> None:
    data = load_breast_cancer()
    x, targets = torch.tensor(data.data).float(), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, rest = order[:400], order[400:]
    head = KernelMemoryUnits(x.shape[1], 2, normalization=normalization, seed=0)
    head.update(x[learn], targets[learn])
    probabilities = head.probabilities(x[rest])
    assert float((probabilities.argmax(dim=1) == targets[rest]).double().mean()) > 0.85
    assert head.temperature < 1 and float(F.nll_loss(probabilities.log(), targets[rest])) < 0.45


@pytest.mark.parametrize("num_projections", [60, 1000])
def test_random_projections_know_their_probes_as_they_were(num_projections: int) -> None:
    data = load_breast_cancer()
    x, targets = torch.tensor(data.data).float(), torch.tensor(data.target)
    head = RandomProjectionRidge(x.shape[1], 2, num_projections=num_projections, seed=0)
    head.update(x[::2], targets[::2])
    probabilities = head.probabilities(x[1::2])
    assert float((probabilities.argmax(dim=1) == targets[1::2]).double().mean()) > 0.85
    assert float(F.nll_loss(probabilities.log(), targets[1::2])) < 0.4


def test_leverage_beyond_one_is_bounded() -> None:
    answers, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    for leverage in (0.95, 0.999, 1.0, 1.2):
        assert float(left_out(answers, targets, torch.tensor([leverage])).abs().max()) < 25
