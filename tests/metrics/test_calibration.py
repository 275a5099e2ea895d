"""Calibration against torchmetrics and torch, and its sums over batches and ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from mh_lightning.metrics import Calibration


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 60), classes=st.integers(2, 6), scale=st.floats(0.1, 50))
def test_is_that_of_torchmetrics_in_batches_of_any_size(seed: int, samples: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator)
    targets = torch.randint(classes, (samples,), generator=generator)
    metric, other = Calibration(), Calibration()
    for part in zip(logits.split(7), targets.split(7), strict=True):
        metric.update(*part)
    other.update(logits.flip(0), targets.flip(0))
    found, again = metric.compute(), other.compute()
    torch.testing.assert_close(found, again)
    # torchmetrics gives probabilities of exactly 1 a bin of their own, the sixteenth
    probabilities = logits.double().softmax(dim=1).clamp_max(1 - 1e-6)
    expected = multiclass_calibration_error(probabilities, targets, classes, n_bins=15, norm="l1")
    torch.testing.assert_close(found["expected_calibration_error"].double(), expected.double(), atol=1e-5, rtol=1e-4)
    likelihood = F.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(found["negative_log_likelihood"], likelihood)


def test_without_samples_there_is_none() -> None:
    metric = Calibration()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert all(bool(value.isnan()) for value in metric.compute().values())


def test_a_sure_answer_that_is_right_costs_nothing_and_one_of_a_class_never_seen_does() -> None:
    lowest = torch.finfo(torch.float32).min / 2
    metric = Calibration()
    metric.update(torch.tensor([[0.0, lowest]]), torch.tensor([0]))
    assert [float(value) for value in metric.compute().values()] == [0, 0]
    metric.update(torch.tensor([[0.0, lowest]]), torch.tensor([1]))
    assert metric.compute()["expected_calibration_error"] == 0.5 and metric.loss > 1e30
