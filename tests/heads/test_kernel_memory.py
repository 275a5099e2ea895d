"""Memory units of a kernel machine, against scikit-learn, data sets built by hand, and other heads."""

import copy

import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.functional.kernel_ridge import (
    Penalty,
    best_kernel_regression,
    neighbourhood,
    responses,
    with_samples_not_kept,
)
from mh_lightning.functional.ridge import Sums, best_regression
from mh_lightning.heads import KernelMemoryUnits, RidgeRegression
from mh_lightning.heads.packed_gram import PackedGram
from tests.blobs import CLASSES, FEATURES, blobs

ROOMY = 1_000_000


def accuracy(head: torch.nn.Module, x: Tensor, targets: Tensor) -> float:
    return float((head(x).argmax(dim=1) == targets).double().mean())


def width_of(z: Tensor, places: int | None = None) -> float:
    """The squared distance within which a tenth of the other samples lie, the median over all (N, n), with a loop."""
    found = []
    for sample in z:
        distances = sorted({float((sample - other).square().sum()) for other in z} - {0.0})
        distances = [one for one in distances for _ in range(2 if places else 1)]  # of samples that are there twice
        found.append(distances[(places or max(1, len(z) // 10)) - 1])
    return sorted(found)[(len(found) - 1) // 2]


@pytest.mark.parametrize("normalization", ["l2", "none"])
def test_is_scikit_learns_kernel_ridge_where_every_sample_is_a_key(normalization: str) -> None:
    x, targets = blobs(200, 1)
    if normalization == "l2":
        x = x + 20 * torch.eye(FEATURES)[0]  # one side of the sphere
    head = KernelMemoryUnits(
        FEATURES, CLASSES, 200, ROOMY, linear_penalty=1e12, linear_part=False, normalization=normalization, seed=0
    )
    head.update(x, targets)
    logits = head(x.double())
    z = (
        F.normalize(x.double(), dim=1)
        if normalization == "l2"
        else (x.double() - x.double().mean(0)) / ((x.double() - x.double().mean(0)).square().mean().sqrt())
    )
    gamma = 1 / (1.4 * width_of(z))
    reference = KernelRidge(kernel="rbf", gamma=gamma, alpha=float(head.ridge))
    reference.fit(z.numpy(), F.one_hot(targets, CLASSES).double().numpy())
    tolerance = 0.02 if normalization == "l2" else 1e-6  # kept in 16 bits, or as it is
    expected = torch.from_numpy(reference.predict(z.numpy()))
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_not_kept_takes_part_through_its_linear_part() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.cat([torch.randn(400, 3, generator=generator), torch.ones(400, 1)], dim=1).double()
    response = responses(linear[:, :3], linear[:6, :3], 2.0)
    targets = F.one_hot(torch.randint(3, (400,), generator=generator), 3).double()
    kept = slice(0, 100)
    found, of_rest = with_samples_not_kept(Sums.of(linear, targets), linear[kept], response[kept], targets[kept])
    of_kept = Sums.of(linear[kept], response[kept])
    explained = best_regression(of_kept, 100, float(response[kept].square().sum())).weights
    rest = response[kept] - linear[kept] @ explained
    expected = Sums.of(torch.cat([linear, linear @ explained], dim=1), targets)
    expected.gram[4:, 4:] += rest.T @ rest
    expected.products[4:] += rest.T @ targets[kept]
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.products, expected.products, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_rest.gram, rest.T @ rest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_rest.products, rest.T @ targets[kept], rtol=1e-4, atol=1e-4)


def test_sums_are_exact_where_all_is_kept_and_responses_are_nearly_linear() -> None:
    linear = torch.cat([torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), torch.ones(400, 1)], dim=1)
    linear = linear.double()
    response = responses(linear[:, :3], linear[:6, :3], 2000.0)
    targets = F.one_hot(torch.arange(400) % 3, 3).double()
    found, _ = with_samples_not_kept(Sums.of(linear, targets), linear, response, targets)
    direct = Sums.of(torch.cat([linear, response], dim=1), targets)
    torch.testing.assert_close(found.gram, direct.gram, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.products, direct.products, rtol=1e-3, atol=1e-2)


def test_sums_stay_positive_whatever_was_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    rounded = exact + 0.1 * torch.randn(30, 40, generator=generator, dtype=torch.float64)
    targets = F.one_hot(torch.arange(30) % 3, 3).double()
    sums, _ = with_samples_not_kept(Sums.of(exact, targets), rounded[:20], responses(rounded[:20], rounded[:9], 80.0),
                                 targets[:20])  # fmt: skip
    assert float(torch.linalg.eigvalsh(sums.gram)[0]) > -1e-9


@pytest.mark.parametrize("kept", [40, 100, 400])
def test_the_ridge_is_the_best_for_the_samples_that_are_kept(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.cat([torch.randn(400, 3, generator=generator), torch.ones(400, 1)], dim=1).double()
    keys = linear[:6, :3]
    response = responses(linear[:, :3], keys, 2.0)
    targets = F.one_hot((response @ torch.randn(6, 3, generator=generator).double()).argmax(dim=1), 3).double()
    imputed = with_samples_not_kept(Sums.of(linear, targets), linear[:kept], response[:kept], targets[:kept])
    kernel = responses(keys, keys, 2.0)
    asked = torch.cat([linear, response], dim=1)[:5]
    found = best_kernel_regression(imputed, Penalty.of(4, 0.5, kernel), 400, kept, asked)
    (gram, products), (rest, rest_products) = imputed
    penalty = torch.block_diag(0.5 * torch.eye(4, dtype=torch.float64), kernel)
    none = torch.zeros(4, 4, dtype=torch.float64)
    part = kept / 400  # of the linear sums, those of the rest whole
    gram_of_kept = part * (gram - torch.block_diag(none, rest)) + torch.block_diag(none, rest)
    beyond = torch.cat([none[:, :3], rest_products])
    products_of_kept = part * (products - beyond) + beyond

    def score(ridge: float) -> float:
        inverse = torch.linalg.inv(gram + ridge * penalty)
        weights = inverse @ products
        error = kept - 2 * (weights * products_of_kept).sum() + (weights * (gram_of_kept @ weights)).sum()
        freedom = (gram_of_kept @ inverse).trace()
        return float(error / (1 - freedom / kept) ** 2) if freedom <= kept / 2 else torch.inf

    largest = float(torch.linalg.eigvals(torch.linalg.solve(penalty, gram)).real.max())
    best = min((10 * largest * 10 ** (-step / 4) for step in range(29)), key=score)
    assert found.ridge == pytest.approx(best, rel=1e-4)
    inverse = torch.linalg.inv(gram + best * penalty)
    torch.testing.assert_close(found.weights, inverse @ products, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.leverage, (asked @ inverse * asked).sum(dim=1), rtol=1e-4, atol=1e-6)


def test_few_kept_samples_of_many_answer_as_if_they_were_all() -> None:
    """What is not kept, and has no linear sums, must not decide the ridge."""
    x, targets = far_blobs(6000, 1)
    queries, wanted = far_blobs(2000, 2)
    of_many, of_few = (KernelMemoryUnits(40, 5, max_bytes=10_000, linear_part=False, seed=0) for _ in range(2))
    of_many.update(x, targets)
    of_many.settle()
    kept = len(of_many.store)
    of_few.update(x[:kept], targets[:kept])
    assert kept < 500 and accuracy(of_many, queries, wanted) > accuracy(of_few, queries, wanted) - 0.01
    assert float(of_many.ridge) == pytest.approx(float(of_few.ridge), rel=2)


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_a_packed_gram_is_the_gram(size: int) -> None:
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(3))
    gram = PackedGram(size, torch.float32)
    gram.add(x[:20])
    gram.add(x[20:])
    torch.testing.assert_close(gram.whole().float(), x.T @ x)
    assert gram.strips.numel() <= size * (size + 128) / 2 or size < 128


def test_moons_in_any_order() -> None:
    points, labels = make_moons(1200, noise=0.1, random_state=0)
    x, targets = torch.from_numpy(points), torch.from_numpy(labels)
    for order in (torch.arange(1000), torch.argsort(targets[:1000]), torch.argsort(x[:1000, 0])):
        head = KernelMemoryUnits(2, 2, max_bytes=20_000, normalization="none", seed=0)
        for rows in order.split(37):
            head.update(x[rows], targets[rows])
        assert len(head.store) < 1000
        assert accuracy(head, x[1000:], targets[1000:]) >= 0.98


def far_blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of two centres a class, which a linear map cannot tell well, in 40 features."""
    x, targets = blobs(samples, seed, features=40, classes=10)
    return x * 0.5 + 2, targets % 5


def test_the_width_is_that_of_a_tenth_of_the_samples_which_are_not_equal() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert neighbourhood(x) == pytest.approx(width_of(x))
    assert neighbourhood(100 + x.repeat(2, 1)) == pytest.approx(width_of(x, places=10))  # of 100, 98 others differ
    assert neighbourhood(x[:1].repeat(9, 1)) == neighbourhood(x[:1]) == 1  # any would do
    assert neighbourhood(torch.tensor([[0.0], [0.0], [3.0]])) == 9


@pytest.mark.parametrize("max_bytes", [16_000, 30_000, 400_000])
def test_is_never_much_below_one_ridge_and_a_class_may_come_back(max_bytes: int) -> None:
    x, targets = far_blobs(3000, 1)
    queries, wanted = far_blobs(2000, 2)
    one = RidgeRegression(40, 5)
    one.update(x, targets)
    order = torch.cat([torch.argsort(targets[:1500], stable=True), 1500 + torch.argsort(targets[1500:], stable=True)])
    head = KernelMemoryUnits(40, 5, max_bytes=max_bytes, seed=0)
    for rows in order.split(64):
        head.update(x[rows], targets[rows])
    head.settle()
    assert head.linear_part and (len(head.store) < 3000) == (max_bytes < 400_000)
    assert accuracy(head, queries, wanted) >= accuracy(one, queries, wanted) - 0.002


def test_the_order_of_classes_costs_nothing_beyond_the_draw_of_samples() -> None:
    x, targets = far_blobs(3000, 1)
    queries, wanted = far_blobs(2000, 2)
    found = []
    for order in (torch.arange(3000), torch.argsort(targets), torch.argsort(targets, descending=True)):
        head = KernelMemoryUnits(40, 5, max_bytes=30_000, seed=0)
        head.update(x[order], targets[order])
        found.append(accuracy(head, queries, wanted))
    assert max(found) - min(found) < 0.01


def test_the_state_is_as_large_as_it_may_be() -> None:
    head = KernelMemoryUnits(100, 9, max_bytes=200_000)
    kept = sum(value.numel() * value.element_size() for name, value in head.state_dict().items() if "." in name)
    kept += head.class_sums.numel() * head.class_sums.element_size()
    assert 0.99 * 200_000 < kept <= 200_000 + 16  # how many were seen, and in how many bits
    assert head.state_bytes == 200_000


def test_a_state_is_loaded_whole() -> None:
    x, targets = blobs(300, 1)
    first = KernelMemoryUnits(FEATURES, CLASSES, max_bytes=2000, seed=1)
    first.update(x[:200], targets[:200])
    second = KernelMemoryUnits(FEATURES, CLASSES, max_bytes=2000, seed=5)
    second.update(x, targets)
    assert not torch.equal(first.keys, second.keys)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for head in (first, second):
        head.update(x[200:], targets[200:])
    assert torch.equal(first(x), second(x)) and torch.equal(first.keys, second.keys)


def test_keys_are_samples() -> None:
    x, targets = blobs(50, 1)
    head = KernelMemoryUnits(FEATURES, CLASSES, 7, normalization="none", seed=0)
    assert head.keys.shape == (0, FEATURES)
    head.update(x, targets)
    assert head.keys.shape == (7, FEATURES)
    assert float(torch.cdist(head.keys, x.double()).amin(dim=1).max()) < 1e-6


@pytest.mark.parametrize("normalization", ["sqrt", "l2", "none"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_features_that_are_all_equal_leave_the_frequencies(normalization: str, value: float) -> None:
    head = KernelMemoryUnits(FEATURES, 3, normalization=normalization, seed=0)
    head.update(torch.full((60, FEATURES), value), torch.tensor([0] * 30 + [1] * 20 + [2] * 10))
    logits = head(torch.full((2, FEATURES), value))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], torch.tensor([30, 20, 10]) / 60, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_few_samples(samples: int) -> None:
    x, targets = torch.eye(FEATURES)[:samples], torch.arange(samples)
    head = KernelMemoryUnits(FEATURES, CLASSES, seed=0)
    head.update(x, targets)
    assert head(x).argmax(dim=1).tolist() == targets.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must lie in"),
        ({"width": float("nan")}, "width must lie in"),
        ({"linear_penalty": 0}, "linear_penalty must lie in"),
        ({"key_mem_units": 0}, "key_mem_units must be at least 1"),
        ({"normalization": "max"}, "normalization must be"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
        ({"max_bytes": 30}, r"=30: sums of 1 linear features need 32 bytes and the first sample 29; 9052 would hold"),
        ({"max_bytes": 200, "linear_part": True}, r"need 312 bytes .*, or linear_part=false would do"),
    ],
)
def test_refuses(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KernelMemoryUnits(FEATURES, CLASSES, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("common", [0.0, 50.0, 100.0])
def test_what_all_features_share_does_not_hide_classes_from_codes(common: float) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(3000) % 10
    x = common + torch.randn(10, 64, generator=generator)[targets]
    x += 0.5 * torch.randn(3000, 64, generator=generator)
    head = KernelMemoryUnits(64, 10, max_bytes=100_000, linear_part=False, normalization="l2", seed=0)
    head.update(x[:2500], targets[:2500])
    assert int(head.store.bits) == 4
    assert accuracy(head, x[2500:], targets[2500:]) > 0.99
