"""Classifier alignment against a literal, slow version of the published procedure."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassGaussians, TaskHeads
from mh_lightning.methods import ClassifierAlignment
from tests.blobs import CLASSES, FEATURES, blobs

GROUPS = [[2, 0], [1, 3, 5], [6, 4]]
memory_head = partial(
    MHLinear, key_mem_units=4, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_alpha=0.99, tau_eta=1
)


def gaussians() -> ClassGaussians:
    made = ClassGaussians(FEATURES, CLASSES)
    made.gather(range(CLASSES), [blobs(200, 1)])
    return made


def heads(head: Any = nn.Linear, tasks: int = 3) -> TaskHeads:
    torch.manual_seed(0)
    made = TaskHeads(FEATURES, GROUPS, head)
    made.begin_task(tasks - 1)
    return made.requires_grad_(False).eval()


def published_loss(logits: Tensor, sizes: list[int], targets: Tensor, temperature: float) -> Tensor:
    losses = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        if temperature:
            norms = [torch.sqrt((part**2).sum()) + 1e-7 for part in row.split(sizes)]
            row = row / (sum(norms) / len(norms)) / temperature
        losses.append(torch.log(torch.exp(row).sum()) - row[target])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.5, 0.0])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_published_procedure(temperature: float, tasks: int) -> None:
    alignment = ClassifierAlignment(
        epochs=3, samples_per_class=20, batch_size=16, learning_rate=0.1, weight_decay=0.01, logit_norm=temperature
    )
    aligned, slow, classes = heads(tasks=tasks), heads(tasks=tasks), gaussians()
    alignment.align(aligned, classes, seed=5)

    sizes = [len(group) for group in GROUPS[:tasks]]
    begun = slow.heads[:tasks].requires_grad_(True)
    velocity = {name: torch.zeros_like(value) for name, value in begun.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    for epoch in range(3):
        rate = 0.1 * (1 + torch.cos(torch.tensor(epoch * torch.pi / 3))) / 2
        features, targets = alignment.draw(slow, classes, generator)
        for start in range(0, len(targets), 16):
            rows, wanted = features[start : start + 16], targets[start : start + 16]
            logits = torch.cat([head(rows) for head in begun], dim=1)
            begun.zero_grad()
            published_loss(logits, sizes, wanted, temperature).backward()  # type: ignore[no-untyped-call]
            for name, value in begun.named_parameters():
                assert value.grad is not None
                velocity[name] = 0.9 * velocity[name] + value.grad + 0.01 * value.detach()
                value.data -= rate * velocity[name]
    for name, value in slow.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_features_are_drawn_around_means_that_grow_with_the_task() -> None:
    classes = ClassGaussians(FEATURES, CLASSES, jitter=1e-12)
    means = torch.arange(1.0, CLASSES + 1)  # of all features of a class, which does not spread
    classes.gather(range(CLASSES), [(means.unsqueeze(1).expand(-1, FEATURES).clone(), torch.arange(CLASSES))])
    features, places = ClassifierAlignment(samples_per_class=3).draw(heads(), classes, torch.Generator().manual_seed(0))
    assert torch.bincount(places).tolist() == [3] * CLASSES
    assert not torch.equal(places, places.sort().values)
    order = [label for group in GROUPS for label in group]
    scales = [0.9 + 0.1 * (task + 1) / 3 for task, group in enumerate(GROUPS) for _ in group]
    expected = torch.tensor([scale * (label + 1) for scale, label in zip(scales, order, strict=True)])
    torch.testing.assert_close(features, expected[places].unsqueeze(1).expand_as(features), rtol=0, atol=1e-4)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("keys", ["ad_hoc_WTA", "grad_WTA"])
def test_keys_move_only_if_they_may(freeze: bool, keys: str) -> None:
    aligned = heads(partial(memory_head, upd_k=keys))
    before = {name: value.clone() for name, value in aligned.state_dict().items()}
    ClassifierAlignment(epochs=1, freeze_keys=freeze, samples_per_class=32).align(aligned, gaussians(), seed=1)
    for name, value in aligned.state_dict().items():
        kind = name.rpartition(".")[2]
        if kind == "M":
            assert not torch.equal(value, before[name])
        elif kind in ("K", "mu", "eta", "key_counter", "scrambling_count"):
            assert torch.equal(value, before[name]) == freeze, name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in aligned.parameters())


def test_the_same_seed_gives_the_same_heads() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.rand(1)  # what else is drawn is no matter
        aligned = heads()
        ClassifierAlignment(epochs=1).align(aligned, gaussians(), seed)
        results.append(aligned.heads[0].weight)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_heads_of_tasks_to_come_stay_as_they_are() -> None:
    aligned = heads(tasks=2)
    before = aligned.heads[2].weight.clone()
    ClassifierAlignment(epochs=1).align(aligned, gaussians(), seed=0)
    assert torch.equal(aligned.heads[2].weight, before)


@pytest.mark.parametrize("options", [{"logit_norm": 0.0}, {"epochs": 1, "batch_size": 10_000}], ids=str)
def test_an_alignment_that_diverges(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"alignment\.learning_rate=1e\+38 is too large"):
        ClassifierAlignment(learning_rate=1e38, **options).align(heads(), gaussians(), seed=0)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"epochs": 0}, r"alignment\.epochs must be at least 1, got 0"),
        ({"samples_per_class": -1}, r"alignment\.samples_per_class must be at least 1, got -1"),
        ({"batch_size": 0}, r"alignment\.batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"alignment\.learning_rate must be above 0 and finite, got 0\.0"),
        ({"learning_rate": float("nan")}, r"alignment\.learning_rate must be above 0 and finite, got nan"),
        ({"logit_norm": -0.1}, r"alignment\.logit_norm must be at least 0 and finite, got -0\.1"),
        ({"momentum": 1.0}, r"alignment\.momentum must lie in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"alignment\.momentum must lie in \[0, 1\), got -0\.1"),
        ({"weight_decay": -1.0}, r"alignment\.weight_decay must be at least 0 and finite, got -1\.0"),
        ({"covariance": "none"}, r"alignment\.covariance must be one of full, low_rank, shared; got 'none'"),
        ({"rank": 0}, r"alignment\.rank must be at least 1, got 0"),
        ({"jitter": -1.0}, r"alignment\.jitter must be above 0 and finite, got -1\.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        ClassifierAlignment(**options)
