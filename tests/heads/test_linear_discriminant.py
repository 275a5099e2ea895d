"""Linear discriminants, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mh_lightning.errors import UserError
from mh_lightning.heads import StreamingLinearDiscriminant
from tests.blobs import CLASSES, FEATURES, blobs


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("shrinkage", [0.0, 1e-4, 0.3, 1.0])
@pytest.mark.parametrize("classes", [CLASSES, 2])
def test_is_scikit_learns_discriminant_without_priors(offset: float, shrinkage: float, classes: int) -> None:
    x, targets = blobs(300, 1, offset, classes=classes)
    head = StreamingLinearDiscriminant(FEATURES, classes, shrinkage)
    for batch in zip(x.split(32), targets.split(32), strict=True):
        head.update(*batch)
    head.settle()
    weights, biases, centre = head.solve()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    reference.fit(x.double().numpy(), targets.numpy())
    coefficients = torch.from_numpy(reference.coef_)
    intercepts = torch.from_numpy(reference.intercept_)
    log_priors = torch.from_numpy(np.log(reference.priors_))
    biases = biases - weights @ centre
    # the mean of all samples gives all classes the same more; of two classes scikit-learn keeps the difference alone
    weights, biases, log_priors = (part[1:] - part[:1] for part in (weights, biases, log_priors))
    if classes > 2:
        coefficients, intercepts = (part[1:] - part[:1] for part in (coefficients, intercepts))
    scale = coefficients.abs().max()
    torch.testing.assert_close(weights / scale, coefficients / scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(biases, intercepts - log_priors, rtol=1e-4, atol=1e-4)
    decisions = torch.from_numpy(reference.decision_function(x.double().numpy())).view(len(x), -1)
    logits = head(x.double())
    torch.testing.assert_close(
        logits[:, 1:] - logits[:, :1],
        (decisions if classes == 2 else decisions[:, 1:] - decisions[:, :1]) - log_priors,
        rtol=1e-3,
        atol=1e-3,
    )


def test_without_any_spread_the_nearest_mean_wins() -> None:
    head = StreamingLinearDiscriminant(2, 3, shrinkage=0.0)
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    head.update(points.repeat(2, 1), torch.arange(3).repeat(2))
    assert head(points + torch.tensor([1.0, 1.0])).argmax(dim=1).tolist() == [0, 1, 2]
    torch.testing.assert_close(head.solve()[0].float(), points - points.mean(dim=0))


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_a_shrinkage_out_of_range_is_refused(shrinkage: float) -> None:
    with pytest.raises(UserError, match=rf"shrinkage must lie in \[0, 1\], got {shrinkage}"):
        StreamingLinearDiscriminant(2, 2, shrinkage)


def test_too_few_samples_for_no_shrinkage_are_refused() -> None:
    x, targets = blobs(CLASSES + FEATURES - 1, 1)
    head = StreamingLinearDiscriminant(FEATURES, CLASSES, shrinkage=0.0)
    head.update(x, targets)
    with pytest.raises(UserError, match=r"shrinkage=0\.0: the covariance of 11 samples in 5 dimensions .* 0\.0001"):
        head(x)
    head.update(x + 1, targets)
    assert head(x).isfinite().all()
