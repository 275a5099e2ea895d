"""The pure functions: cases worked by hand, and properties."""

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mh_lightning import functional

DISTANCES = ["cosine", "dot_scaled", "euclidean"]
every_distance = pytest.mark.parametrize("distance", DISTANCES)
some = hypothesis.settings(deadline=None, max_examples=40)
sizes, seeds = st.integers(1, 5), st.integers(0, 2**16)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def shuffle(units: int, seed: int) -> Tensor:
    return torch.randperm(units, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("cosine", [2.5, -0.5]),  # products 5 and -1, over sqrt(4)
        ("dot_scaled", [2.5, -0.5]),
        ("euclidean", [math.exp(-5.0), math.exp(-9.0)]),  # squared distances 5 and 9, over sqrt(4) * 0.5
    ],
)
def test_match_by_hand(distance: str, expected: list[float]) -> None:
    z = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    keys = torch.tensor([[[1.0, 2.0, 2.0, -1.0], [1.0, -1.0, 0.0, 0.0]]])
    torch.testing.assert_close(functional.match(z, keys, distance, sigma_eu=0.5), torch.tensor([[expected]]))


@every_distance
@some
@hypothesis.given(sizes, sizes, sizes, sizes, seeds)
def test_match_treats_every_unit_alone(distance: str, b: int, q: int, m: int, d: int, seed: int) -> None:
    z, keys = drawn(seed, (b, d), (q, m, d))
    responses = functional.match(z, keys, distance, sigma_eu=0.7)
    for i in range(b):
        for s in range(q):
            for j in range(m):
                expected = z[i] @ keys[s, j] / math.sqrt(d)
                if distance == "euclidean":
                    expected = torch.exp(-(z[i] - keys[s, j]).square().sum() / (math.sqrt(d) * 0.7))
                torch.testing.assert_close(responses[i, s, j], expected)


def test_euclidean_response_of_a_sample_that_is_a_key() -> None:
    (keys,) = drawn(0, (3, 4, 6))
    torch.testing.assert_close(functional.match(keys[1], keys, "euclidean")[:, 1].diagonal(), torch.ones(4).double())


@some
@hypothesis.given(sizes, sizes, sizes, st.floats(0, 30), st.data())
def test_attend(b: int, q: int, m: int, gamma: float, data: st.DataObject) -> None:
    delta = data.draw(st.integers(1, m))
    (responses,) = drawn(data.draw(seeds), (b, q, m))
    top, units, alphas = functional.attend(responses, delta, gamma)
    assert top.shape == units.shape == alphas.shape == (b, q, delta)
    torch.testing.assert_close(alphas.sum(2), torch.ones(b, q, dtype=torch.float64))
    assert (alphas >= 0).all()
    assert torch.equal(top, responses.gather(2, units))
    assert torch.equal(top, responses.sort(dim=2, descending=True).values[..., :delta])
    ratios = torch.exp(gamma * (top - top[..., :1]))
    torch.testing.assert_close(alphas / alphas[..., :1], ratios)

    order = shuffle(m, data.draw(seeds))
    shuffled = functional.attend(responses[..., order], delta, gamma)
    torch.testing.assert_close(shuffled.alphas, alphas)
    assert torch.equal(order[shuffled.units], units)
    torch.testing.assert_close(functional.attend(responses + 3, delta, gamma).alphas, alphas)


def test_attend_by_hand() -> None:
    attention = functional.attend(torch.tensor([[[0.0, 2.0, 1.0, -9.0]]]), delta=3, gamma_alpha=math.log(2.0))
    assert attention.units.tolist() == [[[1, 2, 0]]]
    torch.testing.assert_close(attention.alphas, torch.tensor([[[4 / 7, 2 / 7, 1 / 7]]]))
    assert functional.attend(torch.randn(2, 1, 3), 2, 0.0).alphas.eq(0.5).all()


def test_spread_by_hand() -> None:
    alphas, units = torch.tensor([[[0.7, 0.3]] * 2]), torch.tensor([[[2, 0], [1, 2]]])
    assert torch.equal(
        functional.spread(alphas, units, 4), torch.tensor([[[0.3, 0.0, 0.7, 0.0], [0.0, 0.7, 0.3, 0.0]]])
    )


@pytest.mark.parametrize("own_inputs", [False, True])
@some
@hypothesis.given(sizes, sizes, sizes, sizes, sizes, st.data())
def test_blend_mixes_weights(own_inputs: bool, b: int, q: int, m: int, p: int, n: int, data: st.DataObject) -> None:
    delta = data.draw(st.integers(1, m))
    responses, memories, inputs = drawn(data.draw(seeds), (b, q, m), (q, m, p, n), (b, q, n) if own_inputs else (b, n))
    attention = functional.attend(responses, delta, 2.0)
    outputs = functional.blend(inputs, memories.flatten(2), attention).view(b, q, p)
    for i in range(b):
        for s in range(q):
            chosen = zip(attention.alphas[i, s], attention.units[i, s], strict=True)
            weights = sum((alpha * memories[s, unit] for alpha, unit in chosen), torch.zeros(p, n).double())
            torch.testing.assert_close(outputs[i, s], weights @ (inputs[i, s] if own_inputs else inputs[i]))

    order = shuffle(m, data.draw(seeds))
    shuffled = functional.blend(
        inputs, memories[:, order].flatten(2), functional.attend(responses[..., order], delta, 2.0)
    ).view(b, q, p)
    torch.testing.assert_close(shuffled, outputs)


@pytest.mark.parametrize("own_inputs", [False, True])
def test_blend_gradients(own_inputs: bool) -> None:
    alphas, memories, inputs = drawn(0, (3, 2, 2), (2, 4, 3, 5), (3, 2, 5) if own_inputs else (3, 5))
    units = torch.stack([shuffle(4, i)[:2] for i in range(6)]).view(3, 2, 2)

    def outputs(inputs: Tensor, memories: Tensor, alphas: Tensor) -> Tensor:
        return functional.blend(inputs, memories.flatten(2), functional.Attention(alphas, units, alphas))

    leaves = [tensor.requires_grad_() for tensor in (inputs, memories, alphas)]
    assert torch.autograd.gradcheck(outputs, leaves)


def test_only_the_winners_memory_learns() -> None:
    x = torch.tensor([[2.0, 1.0], [1.0, -1.0]], requires_grad=True)
    memories = torch.arange(12.0).view(1, 3, 2, 2).requires_grad_()
    alphas = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]])
    attention = functional.Attention(alphas, torch.tensor([[[2, 0]], [[0, 1]]]), alphas)
    functional.blend(x, memories.flatten(2), attention, winner_only=True)[..., 0].sum().backward()
    expected = torch.zeros(1, 3, 2, 2)
    expected[0, 2, 0] = 0.75 * x[0].detach()
    expected[0, 0, 0] = 0.5 * x[1].detach()
    torch.testing.assert_close(memories.grad, expected, rtol=0.0, atol=0.0)
    # the constants still shape the gradient of the input
    first_rows = memories.detach()[0, :, 0]
    rows = torch.stack([0.75 * first_rows[2] + 0.25 * first_rows[0], 0.5 * first_rows[0] + 0.5 * first_rows[1]])
    torch.testing.assert_close(x.grad, rows)


THRESHOLDS: dict[str, Any] = {"tau_alpha": 0.5, "tau_mu": 3, "tau_eta": 10}


def plan(responses: list[float], mu: list[int], eta: list[int]) -> functional.ScramblePlan:
    return functional.plan_scramble(
        torch.tensor(responses).unsqueeze(1), torch.tensor([mu]), torch.tensor([eta]), **THRESHOLDS
    )


def test_scramble_by_hand() -> None:
    recycled = plan([0.4, 0.2, 0.9], mu=[0, 0, 0, 9], eta=[10, 30, 30, 99])
    # unit 3 is used too much; of 1 and 2, equally old, the first; for sample 1
    assert [part.tolist() for part in recycled] == [[True], [1], [1]]


@pytest.mark.parametrize(
    ("response", "mu", "eta", "active"),
    [
        (0.49, 2, 10, True),
        (0.5, 2, 10, False),  # known well enough
        (0.49, 3, 10, False),  # used enough
        (0.49, 2, 9, False),  # too young
    ],
)
def test_scramble_thresholds(response: float, mu: int, eta: int, active: bool) -> None:
    assert plan([0.9, response], mu=[9, mu], eta=[0, eta]).wanted.tolist() == [active]


@some
@hypothesis.given(sizes, sizes, sizes, seeds)
def test_scramble_plans_each_key_set_alone(b: int, q: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    responses = torch.rand(b, q, generator=generator)
    mu, eta = torch.randint(6, (q, m), generator=generator), torch.randint(20, (q, m), generator=generator)
    planned = functional.plan_scramble(responses, mu, eta, **THRESHOLDS)
    expected = []
    for s in range(q):
        weak = [j for j in range(m) if mu[s, j] < 3 and eta[s, j] >= 10]
        sample = min(range(b), key=lambda i: responses[i, s].item())
        if weak and responses[sample, s].item() < 0.5:
            expected.append((s, max(weak, key=lambda j: eta[s, j].item()), sample))
    found = [
        (s, *rest) for s, (wanted, *rest) in enumerate(zip(*(part.tolist() for part in planned), strict=True)) if wanted
    ]
    assert found == expected


KEYS = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]]])
PULLS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("dot_scaled", [1.25, 1.0, 0.0, 0.0]),  # K + 0.5 / 2 * (z1 + z2)
        ("cosine", [0.6, 0.8, 0.0, 0.0]),  # K + 0.5 * (z1 + z2) = (1.5, 2), normalised
        # K + 0.5 / (2 * 0.25) * (0.5 (z1 - K) + 0.25 (z2 - K)) = (0.75, 1.25)
        ("euclidean", [0.75, 1.25, 0.0, 0.0]),
    ],
)
def test_pulls_add_up(distance: str, expected: list[float]) -> None:
    winners, responses = torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0.5], [0.25]])
    moved = functional.move_keys_(KEYS.clone(), PULLS, winners, responses, distance=distance, beta_k=0.5, sigma_eu=0.25)
    torch.testing.assert_close(moved[0, 0], torch.tensor(expected))
    others = F.normalize(KEYS[0, 1:], dim=1) if distance == "cosine" else KEYS[0, 1:]
    torch.testing.assert_close(moved[0, 1:], others)


def test_pulls_are_rounded_as_published() -> None:
    keys, z = torch.randn(2, 3, 7), torch.randn(40, 7)
    winners = torch.randint(3, (40, 2))
    expected = keys.clone()
    for sample, won in zip(z, winners, strict=True):
        for key_set, winner in enumerate(won):
            expected[key_set, winner] += 0.3 / math.sqrt(7) * sample
    moved = functional.move_keys_(keys, z, winners, torch.ones(40, 2), distance="dot_scaled", beta_k=0.3)
    assert torch.equal(moved, expected)


def test_one_sample_normalises_only_its_winner() -> None:
    moved = functional.move_keys_(
        KEYS.clone(), PULLS[:1], torch.tensor([[0]]), torch.ones(1, 1), distance="cosine", beta_k=1.0
    )  # fmt: skip
    torch.testing.assert_close(moved[0, 0], torch.tensor([2.0, 1.0, 0.0, 0.0]) / math.sqrt(5))
    assert torch.equal(moved[0, 1:], KEYS[0, 1:])


@every_distance
@some
@hypothesis.given(st.integers(1, 6), sizes, sizes, sizes, st.data())
def test_order_of_samples_and_units_does_not_matter(
    distance: str, b: int, q: int, m: int, d: int, data: st.DataObject
) -> None:
    seed = data.draw(seeds)
    keys, z, responses = drawn(seed, (q, m, d), (b, d), (b, q))
    winners = torch.randint(m, (b, q), generator=torch.Generator().manual_seed(seed))
    moved = functional.move_keys_(keys.clone(), z, winners, responses.exp(), distance=distance, beta_k=0.3)
    rows, units = shuffle(b, data.draw(seeds)), shuffle(m, data.draw(seeds))
    options: dict[str, Any] = {"distance": distance, "beta_k": 0.3}
    torch.testing.assert_close(
        functional.move_keys_(keys.clone(), z[rows], winners[rows], responses[rows].exp(), **options), moved
    )
    renamed = units.argsort()[winners]
    torch.testing.assert_close(
        functional.move_keys_(keys[:, units], z, renamed, responses.exp(), **options), moved[:, units]
    )


def test_euclidean_response_keeps_its_digits_far_from_the_origin() -> None:
    torch.manual_seed(0)
    z, keys = torch.randn(20, 64) * 0.1, torch.randn(1, 10, 64) * 0.1
    near = functional.match(z.double(), keys.double(), "euclidean", 0.1)
    far = functional.match(z + 1000, keys + 1000, "euclidean", 0.1)
    # adding 1000 rounds the inputs themselves to about 6e-5
    assert (near - far).abs().max() < 1e-2
    assert (near.argmax(2) == far.argmax(2)).float().mean() > 0.9
