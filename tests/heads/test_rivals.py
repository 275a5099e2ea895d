"""Rivals and upper bounds, against scikit-learn and their formulas on all samples at once."""

import copy

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.functional.kernel_ridge import neighbourhood
from mh_lightning.heads import (
    ClosedFormHead,
    JointKernelRidge,
    JointLogisticRegression,
    RandomFeatureDiscriminant,
    RandomFeatureRidge,
    RegularisedDiscriminant,
    TruncatedProjection,
)
from mh_lightning.heads.joint import PENALTIES, STRENGTHS, JointHead
from mh_lightning.heads.random_projection import draw_held_out
from tests.blobs import CLASSES, FEATURES, blobs

RAW = {"normalization": "none"}


def learnt(head: ClosedFormHead, samples: int = 400) -> tuple[Tensor, Tensor]:
    x, targets = blobs(samples, 1)
    for batch in zip(x.split(37), targets.split(37), strict=True):
        head.update(*batch)
    head.settle()
    return x, targets


def one_hot(targets: Tensor) -> Tensor:
    return F.one_hot(targets, CLASSES).double()


@pytest.mark.parametrize("kind", ["relu", "fourier"])
@pytest.mark.parametrize("normalization", ["none", "l2", "sqrt"])
def test_random_feature_ridge_is_scikit_learns_with_the_best_ridge(kind: str, normalization: str) -> None:
    head = RandomFeatureRidge(FEATURES, CLASSES, 30, kind, normalization=normalization, seed=0)
    x, targets = learnt(head)
    if normalization == "none":
        z = x
    elif normalization == "l2":
        z = F.normalize(x, dim=1)
    else:
        z = F.normalize(x.sign() * x.abs().sqrt(), dim=1)
    projected = z @ head.projection.matrix
    hidden = projected.relu() if kind == "relu" else 2**0.5 * torch.cos((2 / 1.1) ** 0.5 * projected + head.phases)
    hidden = hidden.double()
    errors = {}
    values = torch.linalg.eigvalsh(hidden.T @ hidden)
    for step in range(29):
        ridge = float(10 * values[-1]) * 10 ** (-step / 4)
        model = Ridge(alpha=ridge, fit_intercept=False).fit(hidden.numpy(), one_hot(targets).numpy())
        predicted = torch.from_numpy(model.predict(hidden.numpy()))
        freedom = float((values / (values + ridge)).sum())
        errors[float((one_hot(targets) - predicted).square().sum()) / (1 - freedom / len(x)) ** 2] = predicted
    torch.testing.assert_close(head(x).double(), errors[min(errors)], rtol=1e-3, atol=1e-3)


def test_fourier_features_have_the_products_of_the_gaussian_kernel() -> None:
    head = RandomFeatureRidge(FEATURES, CLASSES, 20_000, "fourier", width=3.0, normalization="none", seed=0)
    x, _ = blobs(10, 1)
    hidden = head.hidden(x)
    kernel = torch.exp(-torch.cdist(x, x).square() / 3)
    torch.testing.assert_close(hidden @ hidden.T / 20_000, kernel, rtol=0, atol=0.03)


@pytest.mark.parametrize("shrinkage", [0.01, 0.5])
def test_kernel_discriminant_is_its_formula_on_the_features(shrinkage: float) -> None:
    head = RandomFeatureDiscriminant(FEATURES, CLASSES, 30, shrinkage=shrinkage, seed=0, **RAW)
    x, targets = learnt(head)
    hidden = head.hidden(x).double()
    covariance = sum(
        (hidden[targets == c] - hidden[targets == c].mean(0)).T @ (hidden[targets == c] - hidden[targets == c].mean(0))
        for c in range(CLASSES)
    ) / len(x)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 30 * torch.eye(30)
    means = torch.stack([hidden[targets == c].mean(0) for c in range(CLASSES)])
    weights = torch.linalg.solve(shrunk, means.T)
    expected = hidden @ weights - 0.5 * (means.T * weights).sum(0)
    logits = head(x).double()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-2])
def test_kernel_discriminant_of_samples_that_hardly_differ(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 50, generator=generator)
    targets = torch.arange(30) % 3
    x = centres[targets] + spread * torch.randn(30, 50, generator=generator)
    head = RandomFeatureDiscriminant(50, 3, 2000, seed=0)
    head.update(x, targets)
    assert torch.equal(head(x).argmax(dim=1), targets)


@pytest.mark.parametrize(("rank", "exact"), [(FEATURES, True), (64, True), (2, False)])
def test_regularised_discriminant_is_its_formula(rank: int, exact: bool) -> None:
    head = RegularisedDiscriminant(FEATURES, CLASSES, rank, alphas=(0.3, 0.6, 0.05), **RAW)
    x, targets = learnt(head)
    x = x.double()
    counts = torch.bincount(targets).double()
    means = torch.stack([x[targets == c].mean(0) for c in range(CLASSES)])
    scatters = torch.stack([(x[targets == c] - means[c]).T @ (x[targets == c] - means[c]) for c in range(CLASSES)])
    shared = scatters.sum(0) / len(x)
    if not exact:  # what is kept is nearly the two largest directions
        values, vectors = torch.linalg.eigh(scatters)
        scatters = vectors[:, :, -2:] * values[:, None, -2:] @ vectors[:, :, -2:].mT
    expected = torch.stack(
        [
            torch.distributions.MultivariateNormal(
                means[c],
                0.3 * scatters[c] / counts[c] + 0.6 * shared + 0.05 * shared.trace() / FEATURES * torch.eye(FEATURES),
            ).log_prob(x)
            for c in range(CLASSES)
        ],
        dim=1,
    ) + 0.5 * FEATURES * torch.log(torch.tensor(2 * torch.pi))
    tolerance = 1e-3 if exact else 0.2
    torch.testing.assert_close(head(x.float()).double(), expected, rtol=tolerance, atol=tolerance)


def test_truncated_projection_is_the_pseudoinverse_of_the_strongest_directions() -> None:
    for rank in (8, 30):
        head = TruncatedProjection(FEATURES, CLASSES, 30, rank, seed=0, **RAW)
        x, targets = learnt(head)
        hidden = head.hidden(x).double()
        u, s, v = torch.linalg.svd(hidden, full_matrices=False)
        weights = v[:rank].T @ ((u[:, :rank].T @ one_hot(targets)) / s[:rank, None])
        torch.testing.assert_close(head(x).double(), hidden @ weights, rtol=1e-3, atol=5e-3)


def test_truncated_projection_in_chunks_is_close_to_that_of_all() -> None:
    x, targets = blobs(4000, 1)
    whole = TruncatedProjection(FEATURES, CLASSES, 100, 60, seed=0, **RAW)
    whole.waits = False  # type: ignore[misc]
    parts = TruncatedProjection(FEATURES, CLASSES, 100, 60, seed=0, **RAW)
    whole.update(x[:1000], targets[:1000])
    parts.update(x[:1000], targets[:1000])
    for head in (whole, parts):
        for batch in zip(x[1000:].split(250), targets[1000:].split(250), strict=True):
            head.update(*batch)
    agree = whole(x).argmax(1) == parts(x).argmax(1)
    assert float(agree.double().mean()) > 0.98


def test_joint_logistic_regression_is_scikit_learns() -> None:
    head = JointLogisticRegression(FEATURES, CLASSES, seed=3, **RAW)
    x, targets = learnt(head)
    held_out = draw_held_out(3, 0, len(x))
    losses = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(x[~held_out].numpy(), targets[~held_out].numpy())
        logits = torch.from_numpy(model.decision_function(x[held_out].numpy()))
        losses[float(F.cross_entropy(logits, targets[held_out]))] = strength
    model = LogisticRegression(C=losses[min(losses)], max_iter=1000).fit(x.numpy(), targets.numpy())
    expected = torch.from_numpy(model.predict_proba(x.numpy())).double()
    torch.testing.assert_close(head(x).double().softmax(dim=1), expected, rtol=1e-2, atol=1e-3)


def test_joint_logistic_regression_of_one_and_of_two_classes() -> None:
    x, targets = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.ones(30, dtype=torch.long)
    head = JointLogisticRegression(3, 4, seed=0, **RAW)
    head.update(x, targets)
    assert head(x).argmax(1).eq(1).all()
    head.update(x + 5, targets + 1)
    assert head(x).argmax(1).eq(1).all() and head(x + 5).argmax(1).eq(2).all()


def test_joint_kernel_ridge_is_scikit_learns() -> None:
    head = JointKernelRidge(FEATURES, CLASSES, seed=3, **RAW)
    x, targets = learnt(head)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    gamma = 1 / (1.4 * neighbourhood(x[order].double()))
    held_out = torch.from_numpy(draw_held_out(3, 0, len(x)))
    errors = {}
    for penalty in PENALTIES:
        model = KernelRidge(alpha=penalty, kernel="rbf", gamma=gamma)
        model.fit(x[~held_out].double().numpy(), one_hot(targets[~held_out]).numpy())
        predicted = torch.from_numpy(model.predict(x[held_out].double().numpy()))
        errors[float((predicted - one_hot(targets[held_out])).square().sum())] = penalty
    model = KernelRidge(alpha=errors[min(errors)], kernel="rbf", gamma=gamma)
    model.fit(x.double().numpy(), one_hot(targets).numpy())
    expected = torch.from_numpy(model.predict(x.double().numpy()))
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [JointKernelRidge, JointLogisticRegression, RandomFeatureRidge, TruncatedProjection,
                                  RandomFeatureDiscriminant, RegularisedDiscriminant])  # fmt: skip
def test_a_state_is_loaded_whole(kind: type[ClosedFormHead]) -> None:
    sizes = {"num_projections": 20} if "num_projections" in kind.__init__.__code__.co_varnames else {}
    seeded = "seed" in kind.__init__.__code__.co_varnames
    first = kind(FEATURES, CLASSES, **sizes, **({"seed": 1} if seeded else {}))
    second = kind(FEATURES, CLASSES, **sizes, **({"seed": 1} if issubclass(kind, JointHead) else {}))
    x, _ = learnt(first, 100)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(second(x), first(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFeatureRidge(2, 2, kind="cosine"), "kind must be"),
        (lambda: RandomFeatureRidge(2, 2, width=0.0), "width must be above 0"),
        (lambda: RandomFeatureRidge(2, 2, num_projections=0), "num_projections must be at least 1"),
        (lambda: RandomFeatureDiscriminant(2, 2, 3, shrinkage=0.0), "shrinkage must"),
        (lambda: RegularisedDiscriminant(2, 2, rank=0), "rank must be at least 1"),
        (lambda: RegularisedDiscriminant(2, 2, alphas=(0.1, 0.9, 0.0)), "alphas must be three numbers"),
        (lambda: TruncatedProjection(2, 2, 3, rank=0), "rank must be at least 1"),
        (lambda: JointKernelRidge(2, 2, width=-1.0), "width must lie in"),
    ],
)
def test_refuses(make: type[ClosedFormHead], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[call-arg]
