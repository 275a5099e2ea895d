"""One optimizer step, wherever it is taken: by the trainer, in chunks, in retraining or in alignment."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from mh_lightning.compat.torch_names import has_hooks
from mh_lightning.distributed import sum_over_ranks, world_size
from mh_lightning.layers import MHLinear


def complete_gradients(
    memory_heads: Iterable[MHLinear], adjust: Callable[[], object] | None = None, skipped: bool = False
) -> None:
    """What happens between the last backward pass of a step and the step itself.

    Args:
        memory_heads: those that wait: keys and counters move, from all micro-batches as if they had been one batch.
        adjust: a method's own treatment of gradients.
        skipped: keys and counters stay where they are, since the step is not going to be taken.
    """
    for layer in memory_heads:
        (layer.drop_key_updates if skipped else layer.apply_key_updates)()
    if adjust is not None:
        adjust()


@dataclass(frozen=True)
class OptimizerStep:
    """Learns by a loss, without the trainer.

    Args:
        optimizer: whose parameters learn.
        step: takes its step.
        memory_heads: those that wait for the step.
        adjust: a method's own treatment of gradients.
        shared: parameters whose gradients are summed over ranks, by default none.
        share: of each rank in the sum: 1 for losses that add up, 1 / ranks for means over ranks.
    """

    optimizer: Optimizer
    step: Callable[[], object]
    memory_heads: Sequence[MHLinear] = ()
    adjust: Callable[[], object] | None = None
    shared: Sequence[nn.Parameter] = ()
    share: float = 1.0

    def __call__(self, loss: Tensor) -> None:
        """Take one step by a loss, whose gradients are the only ones."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        complete_gradients(self.memory_heads, self.adjust)
        if world_size() > 1 and self.shared:
            self._sum_gradients()
        self.step()

    def _sum_gradients(self) -> None:
        """Give each parameter that has a gradient on some rank the sum of all, as one process would have it."""
        found = torch.tensor([parameter.grad is not None for parameter in self.shared], device=self.shared[0].device)
        for parameter, exists in zip(self.shared, sum_over_ranks(found.int()).tolist(), strict=True):
            if exists:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = sum_over_ranks(gradient) * self.share


def count_optimizer_steps(method: LightningModule, steps: int) -> None:
    """Let the trainer's global step count optimizer steps, though it did not take them."""
    progress = method.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for tracker in (progress.total, progress.current):
        tracker.ready += steps
        tracker.completed += steps
    method.log("step", float(method.global_step))  # the axis of the logged curves


def bare_step(optimizer: Optimizer) -> Callable[[], Any]:
    """The optimizer's step, without what serves profilers and hooks around it where there are none: a tenth of the time
    that a small model needs for a sample.
    """
    step: Any = type(optimizer).step
    watched = has_hooks(optimizer) or "step" in vars(optimizer)  # by which schedulers count
    # only the outermost wrapper goes: the next one turns gradients off
    return optimizer.step if watched or not hasattr(step, "__wrapped__") else partial(step.__wrapped__, optimizer)
