"""Ridge memory units, against sums over all samples and direct solutions in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError
from mh_lightning.functional.ridge import (
    PROMISE,
    BlendBound,
    Spectrum,
    candidate_ridges,
    fits_of,
    groups_of_units,
)
from mh_lightning.heads import RandomProjectionRidge, RidgeMemoryUnits
from mh_lightning.heads.ridge_memory import NORMALIZATIONS
from mh_lightning.heads.settling_keys import SettlingKeys
from tests.blobs import CLASSES, FEATURES, blobs

SAMPLES = 400


def learnt(samples: int = SAMPLES, batch: int = 16, **options: Any) -> tuple[RidgeMemoryUnits, Tensor, Tensor]:
    """A head, and what it has learnt."""
    x, targets = blobs(samples, 1)
    head = RidgeMemoryUnits(FEATURES, CLASSES, **options)
    for part in zip(x.split(batch), targets.split(batch), strict=True):
        head.update(*part)
    return head, x, targets


def oracle(x: Tensor, targets: Tensor, queries: Tensor, head: RidgeMemoryUnits) -> Tensor:
    """The same from all samples at once, in float64, with the ridges that were chosen."""
    first, second = head.ridge.tolist()
    origin, length = x.double().mean(dim=0), x.double().var(dim=0, correction=0).mean().sqrt()

    def hidden(points: Tensor) -> tuple[Tensor, Tensor]:
        z = points.double()
        z = z.sign() * z.abs().sqrt() if head.normalization == "sqrt" else z
        z = z if head.normalization == "none" else z / z.norm(dim=1, keepdim=True)
        constant = torch.ones(len(z), 1, dtype=torch.float64)
        if head.projection is not None:
            return z, (z @ head.projection.double()).clamp_min(0)
        standard = (z - origin) / length if head.normalization == "none" else z
        return z, torch.cat([standard, constant], dim=1)

    z, h = hidden(x)
    keys = SettlingKeys(len(head.keys.K), x.shape[1], delta=head.keys.delta, inherited=h.shape[1])
    alphas = keys.learn(z.float()).alphas.double()
    one_hot = F.one_hot(targets, head.num_classes).double()
    identity = torch.eye(h.shape[1], dtype=torch.float64)
    shared = torch.linalg.solve(h.T @ h + first * identity, h.T @ one_hot) * head.shared_unit
    units: list[Tensor] = [torch.zeros_like(shared)] * len(alphas.T)
    for group in groups_of_units(keys.K, alphas.T @ alphas, h.shape[1]):
        weights = alphas[:, group].sum(dim=1)
        left = (h.T * weights) @ (one_hot - h @ shared)
        solved = torch.linalg.solve((h.T * weights) @ h + min(second, 1e12) * identity, left)
        units = [solved if unit in group else former for unit, former in enumerate(units)]
    queried, q = hidden(queries)
    squared = torch.cdist(queried, keys.K.double()).square()
    logits = q @ shared
    for query in range(len(q)):
        near = squared[query].argsort()[: keys.delta].tolist()
        weights = torch.softmax(-2 / keys.gap * squared[query, near], dim=0)
        logits[query] += sum(weight * q[query] @ units[unit] for weight, unit in zip(weights, near, strict=True))
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delta": 3, "shared_unit": False, "normalization": "l2"},
        {"normalization": "none", "ridge": 0.5, "key_mem_units": 4},
        {"num_projections": 12, "seed": 3, "key_mem_units": 3},
    ],
    ids=str,
)
def test_equals_sums_over_all_samples(options: dict[str, Any]) -> None:
    head, x, targets = learnt(**options)
    queries = blobs(30, 2)[0]
    logits = head(queries)
    torch.testing.assert_close(logits.double(), oracle(x, targets, queries, head), rtol=1e-3, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_neither_batches_nor_predictions_in_between_matter(batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 2, generator=generator).cumsum(dim=0)  # which drifts, so that units are re-used
    targets = torch.randint(3, (200,), generator=generator)
    options: dict[str, Any] = {"key_mem_units": 5, "normalization": "none", "tau_eta": 20}
    whole, parts = RidgeMemoryUnits(2, 3, **options), RidgeMemoryUnits(2, 3, **options)
    whole.update(x, targets)
    for place, part in enumerate(zip(x.split(batch), targets.split(batch), strict=True)):
        parts.update(*part)
        if place % 3 == 0:
            parts.settle()
    whole.settle()
    parts.settle()
    assert torch.equal(parts.keys.K, whole.keys.K)
    for name in ("gram", "class_sums", "overlap"):
        ours, theirs = (getattr(head, name).double() for head in (parts, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))
    hidden = whole.project(whole.normalise(x)).double()
    # whatever was re-used, nothing is lost
    torch.testing.assert_close(whole.gram.sum(dim=0).double(), hidden.T @ hidden, rtol=1e-4, atol=1e-2)
    one_hot = F.one_hot(targets, 3).double()
    torch.testing.assert_close(whole.class_sums.sum(dim=0), hidden.T @ one_hot, rtol=1e-4, atol=1e-3)
    assert float(whole.overlap.sum()) == pytest.approx(200, rel=1e-5)


def test_one_unit_with_projections_is_ranpac() -> None:
    x, targets = blobs(600, 1)
    ranpac = RandomProjectionRidge(FEATURES, CLASSES, 40, seed=3)
    ranpac.update(x, targets)
    expected = ranpac(x)
    head = RidgeMemoryUnits(
        FEATURES, CLASSES, 1, ridge=float(ranpac.ridge), normalization="none", num_projections=40, seed=3
    )
    head.update(x, targets)
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)


def test_sums_of_a_hundred_thousand_samples_in_float32_are_accurate() -> None:
    features = 16
    x, targets = blobs(100_000, 1, offset=3.0, features=features)
    head = RidgeMemoryUnits(features, CLASSES, 5)
    for part in zip(x.split(4096), targets.split(4096), strict=True):
        head.update(*part)
    queries = blobs(300, 2, offset=3.0, features=features)[0]
    logits, exact = head(queries).double(), oracle(x, targets, queries, head)
    assert head.gram.dtype == torch.float32 and float((logits - exact).abs().max()) < 1e-3
    assert torch.equal(logits.argmax(dim=1), exact.argmax(dim=1))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_answers_pass_gradients_to_the_features(normalization: str) -> None:
    head, x, _ = learnt(normalization=normalization)
    queries = x[:5].clone().requires_grad_()
    head(queries).square().sum().backward()
    assert queries.grad is not None and bool(queries.grad.any())
    step = 1e-3 * torch.randn(queries.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        change = head(queries + step).square().sum() - head(queries - step).square().sum()
    torch.testing.assert_close(2 * (queries.grad * step).sum(), change, rtol=0.02, atol=1e-4)
    queries = torch.zeros_like(queries, requires_grad=True)  # where roots and lengths have no derivative
    head(queries).square().sum().backward()
    assert queries.grad is not None and bool(queries.grad.isfinite().all())


def test_classes_may_appear_at_any_time() -> None:
    x, targets = blobs(300, 1)
    head = RidgeMemoryUnits(FEATURES, CLASSES)
    known = targets < 3
    head.update(x[known], targets[known])
    assert int(head(x).argmax(dim=1).max()) < 3
    head.update(x[~known], targets[~known])
    assert set(head(x).argmax(dim=1).tolist()) > {3}


def test_units_tell_what_one_regression_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(2000, 2, generator=generator)
    targets = x.long().sum(dim=1) % 2  # a chessboard
    one, many = (RidgeMemoryUnits(2, 2, units, normalization="none") for units in (1, 60))
    for head in (one, many):
        head.update(x[:1500], targets[:1500])
    assert float((one(x[1500:]).argmax(dim=1) == targets[1500:]).float().mean()) < 0.65
    assert float((many(x[1500:]).argmax(dim=1) == targets[1500:]).float().mean()) > 0.85


# --- the choice of the ridge


def test_scores_of_candidates_are_those_of_the_hat_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    ridges = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    fits = fits_of(Spectrum.of(h.T @ h), h.T @ y, y.square().sum(), ridges)
    for place, ridge in enumerate(ridges):
        hat = h @ torch.linalg.solve(h.T @ h + ridge * torch.eye(6), h.T)
        assert float(fits.errors[place]) == pytest.approx(float((y - hat @ y).square().sum()))
        assert float(fits.freedom[place]) == pytest.approx(float(hat.trace()))


class Blend:
    """Noisy samples whose classes hang on where they are, and what attends to them, in float64."""

    def __init__(self, seed: int, samples: int = 40, size: int = 5, units: int = 3, sharp: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.h = torch.randn(samples, size, dtype=torch.float64, generator=generator)
        self.alphas = torch.softmax(
            sharp * torch.randn(samples, units, dtype=torch.float64, generator=generator), dim=1
        )
        local = torch.randn(units, size, 2, dtype=torch.float64, generator=generator)
        self.y = torch.einsum("iu,id,udc->ic", self.alphas, self.h, local)
        self.y += 2 * torch.randn(samples, 2, dtype=torch.float64, generator=generator)

    def weights(self, shared_ridge: float, ridge: float, keep: Tensor) -> tuple[Tensor, Tensor]:
        """W_0 (D, C), and all W_j (m, D, C), from the samples to keep."""
        h, y, identity = self.h[keep], self.y[keep], torch.eye(self.h.shape[1], dtype=torch.float64)
        shared = torch.linalg.solve(h.T @ h + shared_ridge * identity, h.T @ y)
        weighted = [h.T * weights for weights in self.alphas[keep].T]
        penalty = min(ridge, 1e12) * identity
        local = [torch.linalg.solve(left @ h + penalty, left @ (y - h @ shared)) for left in weighted]
        return shared, torch.stack(local)

    def answers(self, shared: Tensor, local: Tensor) -> Tensor:
        return self.h @ shared + torch.einsum("iu,id,udc->ic", self.alphas, self.h, local)

    def bound(self, shared_ridge: float) -> BlendBound:
        gram = self.h.T @ self.h
        spectrum, first = Spectrum.of(gram), torch.tensor(shared_ridge, dtype=torch.float64)
        bound = BlendBound(candidate_ridges(spectrum.values[-1]), spectrum, first)
        shared, _ = self.weights(shared_ridge, 1.0, torch.ones(len(self.h), dtype=torch.bool))
        for weights in self.alphas.T:
            left, rest = self.h.T * weights, self.y - self.h @ shared
            squares = (weights * rest.square().sum(dim=1)).sum()
            bound.add(left @ self.h, left @ rest, squares, weights.sum(), weights.square().sum() / weights.sum())
        return bound

    def left_out(self, shared_ridge: float, ridge: float) -> float:
        """The exact sum of leave-one-out errors."""
        error, everything = 0.0, torch.arange(len(self.h))
        for sample in everything:
            answers = self.answers(*self.weights(shared_ridge, ridge, everything != sample))
            error += float((self.y[sample] - answers[sample]).square().sum())
        return error


@pytest.mark.parametrize("seed", range(4))
def test_the_blend_s_error_is_never_above_what_the_ridge_is_chosen_by(seed: int) -> None:
    blend, everything = Blend(seed), torch.ones(40, dtype=torch.bool)
    bound = blend.bound(3.0)
    assert float(bound.ridges[0]) == float("inf")
    for ridge, score in zip(bound.ridges.tolist(), bound.scores.tolist(), strict=True):
        shared, local = blend.weights(3.0, ridge, everything)
        parts = [blend.y - blend.h @ (shared + unit) for unit in local]
        of_parts = sum((weights * part.square().sum(dim=1)).sum()
                       for weights, part in zip(blend.alphas.T, parts, strict=True))  # fmt: skip
        of_blend = (blend.y - blend.answers(shared, local)).square().sum()
        assert 0 < float(of_blend) <= float(of_parts) * (1 + 1e-9) <= score * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_is_as_good_as_the_best_by_exact_leave_one_out(seed: int) -> None:
    blend = Blend(seed)
    bound = blend.bound(3.0)
    exact = torch.tensor([blend.left_out(3.0, ridge) for ridge in bound.ridges[::4].tolist()])
    chosen = blend.left_out(3.0, float(bound.best()))
    assert chosen < 1.15 * float(exact.min()) and chosen < 1.01 * float(exact[0])  # the first is one regression's
    assert bool((bound.scores[::4] > 0.9 * exact).all())


@pytest.mark.parametrize("with_shared", [True, False])
def test_error_and_freedom_of_units_that_do_not_overlap_are_exact(with_shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(60, 2, dtype=torch.float64, generator=generator)
    unit_of = torch.randint(3, (60,), generator=generator)
    first, ridges = torch.tensor(2.0, dtype=torch.float64), torch.tensor([5.0, 0.1], dtype=torch.float64)
    gram, identity = h.T @ h, torch.eye(4, dtype=torch.float64)
    bound = BlendBound(ridges, Spectrum.of(gram) if with_shared else None, first)
    hat = h @ torch.linalg.solve(gram + first * identity, h.T) * with_shared
    expected = torch.zeros(3, dtype=torch.float64)
    for unit in range(3):
        rows = unit_of == unit
        mine, left = h[rows], y[rows] - hat[rows] @ y
        ones = rows.sum().double()
        bound.add(mine.T @ mine, mine.T @ left, left.square().sum(), ones, torch.ones_like(ones))
        for place, ridge in enumerate([float("inf"), *ridges.tolist()]):
            local = mine @ torch.linalg.solve(mine.T @ mine + min(ridge, 1e12) * identity, mine.T)
            own = hat[rows] + local @ (torch.eye(60, dtype=torch.float64)[rows] - hat[rows])
            freedom = own[:, rows].trace() / ones
            expected[place] += (y[rows] - own @ y).square().sum() / (1 - freedom) ** 2
    torch.testing.assert_close(bound.scores, expected)
    promises = float(expected.min()) < (1 - PROMISE) * float(expected[0])
    assert bound.best() == bound.ridges[int(expected.argmin()) if promises else 0]


def test_units_of_few_samples_answer_with_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    alphas = torch.softmax(3 * torch.randn(90, 8, dtype=torch.float64, generator=generator), dim=1)
    alphas[:, 5] = 0  # a unit without samples
    keys = torch.randn(8, 2, generator=generator)
    groups = groups_of_units(keys, alphas.T @ alphas, 20)
    assert sorted(unit for group in groups for unit in group) == [0, 1, 2, 3, 4, 6, 7] and 1 < len(groups) < 7
    for group in groups:
        weights = alphas[:, group].sum(dim=1)
        assert float(weights.sum() ** 2 / weights.square().sum()) >= 20
    assert groups_of_units(keys, alphas.T @ alphas, 1e9) == [[0, 1, 2, 3, 4, 6, 7]]
    assert groups_of_units(keys, alphas.T @ alphas, 0) == [[0], [1], [2], [3], [4], [6], [7]]


def test_units_of_few_noisy_samples_cost_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 200, generator=generator)
    targets = torch.randint(5, (1250,), generator=generator)
    x = means[targets] + 4 * torch.randn(1250, 200, generator=generator)
    accuracies = []
    for units in (1, 10):
        head = RidgeMemoryUnits(200, 5, units, normalization="none")
        head.update(x[:250], targets[:250])
        accuracies.append(float((head(x[250:]).argmax(dim=1) == targets[250:]).float().mean()))
    assert accuracies[1] >= accuracies[0] - 0.003 and accuracies[0] > 0.6


def test_the_overlap_of_units_that_were_handed_over_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator).cumsum(dim=0)  # which drifts, so that units are re-used
    head = RidgeMemoryUnits(2, 3, 5, normalization="none", tau_eta=20)
    seen, learn = torch.zeros(0, 5, dtype=torch.float64), head.keys.learn

    def watched(z: Tensor) -> Any:
        nonlocal seen
        attracted = learn(z)
        for source, target, share in attracted.moves:
            seen[:, target] += share * seen[:, source]
            seen[:, source] *= 1 - share
        seen = torch.cat([seen, attracted.alphas.double()])
        return attracted

    monkeypatch.setattr(head.keys, "learn", watched)
    for part in x.split(7):
        head.update(part, torch.zeros(len(part), dtype=torch.long))
        head.settle()
    assert int(head.keys.scrambling_count) > 3
    torch.testing.assert_close(head.overlap, seen.T @ seen)


# --- offsets and units of measure


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e-20), (0.0, 1e25)])
@pytest.mark.parametrize("units", [1, 40])
def test_neither_an_offset_nor_a_unit_of_measure_matters(offset: float, scale: float, units: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (64 * 4 * torch.rand(600, 2, generator=generator)).round() / 64  # which an offset does not round
    targets = x.long().sum(dim=1) % 2 if units > 1 else (x[:, 0] > 2).long()
    plain, moved = (RidgeMemoryUnits(2, 2, units, normalization="none") for _ in range(2))
    plain.update(x[:500], targets[:500])
    moved.update((x[:500] + offset) * scale, targets[:500])
    expected = plain(x[500:])
    assert float((expected.argmax(dim=1) == targets[500:]).float().mean()) > 0.7
    rounded = 0.03 if offset else 1e-3  # keys are means, in float32, of points that far away
    torch.testing.assert_close(moved((x[500:] + offset) * scale), expected, rtol=0, atol=rounded)
    torch.testing.assert_close(moved.ridge, plain.ridge, rtol=1e-3, atol=0)


def test_lengths_of_small_features_are_not_lost() -> None:
    x, targets = blobs(200, 1)
    plain, small = (RidgeMemoryUnits(FEATURES, CLASSES, 4, normalization="l2") for _ in range(2))
    plain.update(x, targets)
    small.update(x * 1e-25, targets)
    torch.testing.assert_close(small(x * 1e-25), plain(x), rtol=1e-3, atol=1e-4)


# --- what follows


def test_the_chosen_ridge_is_near_the_best_on_other_samples() -> None:
    x, targets = blobs(500, 1)
    queries, answers = blobs(4000, 2)
    wanted = F.one_hot(answers, CLASSES)

    def error(head: RidgeMemoryUnits) -> float:
        return float((head(queries) - wanted).square().sum(dim=1).mean())

    chosen = RidgeMemoryUnits(FEATURES, CLASSES, 5)
    chosen.update(x, targets)
    by_hand = []
    for exponent in range(-6, 4):
        head = RidgeMemoryUnits(FEATURES, CLASSES, 5, ridge=10.0**exponent)
        head.update(x, targets)
        by_hand.append(error(head))
    assert error(chosen) < 1.02 * min(by_hand) < 0.9 * max(by_hand)


# --- states and mistakes


def test_a_state_goes_on_where_it_was(tmp_path: Any) -> None:
    whole, x, targets = learnt(num_projections=9, seed=5)
    half, again = (RidgeMemoryUnits(FEATURES, CLASSES, num_projections=9, seed=5) for _ in range(2))
    half.update(x[:100], targets[:100])
    torch.save(half.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.update(x[100:], targets[100:])
    torch.testing.assert_close(again(x), whole(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="seed=0: the state was learnt with seed=5"):
        RidgeMemoryUnits(FEATURES, CLASSES, num_projections=9, seed=0).load_state_dict(half.state_dict())


@pytest.mark.parametrize("own", [{}, {"num_projections": 12}], ids=str)
def test_a_regression_beside_the_units(own: dict[str, Any]) -> None:
    options = {"normalization": "l2", "ridge": 0.5, "seed": 4}
    both, x, targets = learnt(key_mem_units=4, projections_beside=9, **own, **options)
    units, *_ = learnt(key_mem_units=4, **own, **options)
    projected, *_ = learnt(key_mem_units=1, num_projections=9, **options)
    queries = blobs(30, 2)[0]
    torch.testing.assert_close(both(queries), (units(queries) + projected(queries)) / 2, rtol=1e-4, atol=1e-5)
    both.update(x[:1], targets[:1])
    units.update(x[:1], targets[:1])
    projected.update(x[:1], targets[:1])
    torch.testing.assert_close(both(queries), (units(queries) + projected(queries)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_projections": 9}, {"projections_beside": 9}], ids=str)
def test_projections_follow_the_seed_of_the_run_and_that_of_a_state(options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    head, x, _ = learnt(**options)
    given, *_ = learnt(seed=7, **options)
    torch.testing.assert_close(head(x), given(x), rtol=0, atol=0)
    torch.manual_seed(8)
    other = RidgeMemoryUnits(FEATURES, CLASSES, **options)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(x), head(x), rtol=0, atol=0)
    again, *_ = learnt(**options)
    with torch.inference_mode():
        other.load_state_dict(again.state_dict())
    torch.testing.assert_close(other(x), again(x), rtol=0, atol=0)
    assert not torch.equal(again(x), head(x))
    other(x[:5].clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("options", [{}, {"num_projections": 8}, {"projections_beside": 8}], ids=str)
def test_bytes_are_counted(options: dict[str, Any]) -> None:
    head = RidgeMemoryUnits(FEATURES, CLASSES, **options)
    parts = [units for units in (head, head.beside) if units is not None]
    kept = [tensor for units in parts for tensor in (units.gram, units.class_sums, units.keys.K)]
    assert head.state_bytes == sum(tensor.numel() * tensor.element_size() for tensor in kept)
    RidgeMemoryUnits(FEATURES, CLASSES, max_bytes=head.state_bytes, **options)
    with pytest.raises(UserError, match=f"max_bytes={head.state_bytes - 1}: .* need {head.state_bytes} bytes"):
        RidgeMemoryUnits(FEATURES, CLASSES, max_bytes=head.state_bytes - 1, **options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"key_mem_units": 0}, "key_mem_units must be at least 1, got 0"),
        ({"delta": 0}, "delta must be at least 1, got 0"),
        ({"ridge": -1.0}, "ridge must be at least 0 and finite, or be 'auto', got -1.0"),
        ({"ridge": float("nan")}, "ridge must be at least 0 and finite, or be 'auto', got nan"),
        ({"ridge": "best"}, "ridge must be at least 0 and finite, or be 'auto', got 'best'"),
        ({"normalization": "l1"}, "normalization must be one of none, l2, sqrt; got 'l1'"),
        ({"num_projections": 0}, "num_projections must be at least 1, got 0"),
        ({"projections_beside": 0}, "projections_beside must be at least 1, got 0"),
        ({"num_projections": 5, "seed": -1}, "seed must lie in"),
        ({"tau_mu": -1}, "tau_mu must be at least 0, got -1"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        RidgeMemoryUnits(2, 3, **options)


def test_sums_that_the_ridge_does_not_make_solvable() -> None:
    x, targets = blobs(100, 1)
    x[:, 1] = x[:, 0]
    head = RidgeMemoryUnits(FEATURES, CLASSES, ridge=0.0, normalization="none")
    head.update(x, targets)
    with pytest.raises(UserError, match=r"ridge=0.0: the sums of .* condition number is at least \de\+\d+; .* 'auto'"):
        head(x)
    beside = RidgeMemoryUnits(FEATURES, CLASSES, 1, ridge=0.0, projections_beside=200)
    beside.update(*blobs(100, 1))
    with pytest.raises(UserError, match="the sums of projections_beside cannot be solved"):
        beside(x)
    automatic = RidgeMemoryUnits(FEATURES, CLASSES, normalization="none")
    automatic.update(x, targets)
    assert bool(automatic(x).isfinite().all())


@pytest.mark.parametrize("num_projections", [None, 4])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_features_that_are_all_zero(normalization: str, num_projections: int | None) -> None:
    head = RidgeMemoryUnits(3, 2, normalization=normalization, num_projections=num_projections)
    head.update(torch.zeros(10, 3), torch.arange(10) % 2)
    assert bool(head(torch.zeros(4, 3)).isfinite().all())
