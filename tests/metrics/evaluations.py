"""Random evaluations, and the comparison of what the metrics make of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from mh_lightning.metrics import Evaluations

NAMES = [
    "accuracy_matrix",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "all_pairs_backward_transfer",
    "all_pairs_backward_transfer_clipped",
    "all_pairs_forward_transfer",
    "last_accuracy",
    "last_accuracy_old",
    "last_accuracy_new",
    "incremental_accuracy",
    "last_accuracy_top5",
    "incremental_accuracy_top5",
]


class Batch(NamedTuple):
    """What an evaluation hands to `update`."""

    predictions: Tensor
    targets: Tensor
    tasks: Tensor
    after_task: int


def outputs(num_tasks: int, after_task: int, seed: int = 0, samples: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits of the classes and four more, targets, and tasks; tasks of two classes, out of order, with
    unequally many samples, one at least.
    """
    generator = torch.Generator().manual_seed(1000 * seed + after_task + 1)
    shares = torch.arange(1.0, num_tasks + 1)
    tasks = torch.cat([torch.arange(num_tasks), torch.multinomial(shares, samples, True, generator=generator)])
    targets = 2 * ((tasks + 1) % num_tasks) + torch.randint(0, 2, tasks.shape, generator=generator)
    logits = torch.rand(len(tasks), 2 * num_tasks + 4, generator=generator)
    known = torch.rand(tasks.shape, generator=generator) < 0.5
    logits[known, targets[known]] += 1
    return logits, targets, tasks


def evaluation(num_tasks: int, after_task: int, seed: int = 0, samples: int = 60) -> Batch:
    """The same with the five most likely classes instead of logits."""
    logits, targets, tasks = outputs(num_tasks, after_task, seed, samples)
    return Batch(logits.argsort(dim=1, descending=True)[:, :5], targets, tasks, after_task)


def split(batch: Batch, size: int) -> list[Batch]:
    parts = zip(*(tensor.split(size) for tensor in batch[:3]), strict=True)
    return [Batch(*part, batch.after_task) for part in parts]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected) == sorted(NAMES)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def worst_task(seen: Evaluations) -> Tensor:
    """A metric of one's own: the accuracy on the task that is known worst."""
    return seen.matrix[-1].min()
