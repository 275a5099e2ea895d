"""Maximally interfered retrieval: replay what the next step would harm most."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mh_lightning.distributed import sum_over_ranks, world_size
from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.replay_buffer import Samples


def most_interfered(losses_before: Tensor, losses_after: Tensor, count: int) -> Tensor:
    """Indices (count,) of the samples whose loss a step would raise most.

    Args:
        losses_before: (s,).
        losses_after: (s,), after the step.
        count: clamped to s.

    Example:
        >>> most_interfered(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.5, 3.0, 3.2]), 2)
        tensor([1, 0])
    """
    rise = losses_after - losses_before
    return rise.topk(min(count, len(rise))).indices


class MaximallyInterferedRetrieval(ReplayMethod):
    """MIR: experience replay of those candidates from the buffer whose loss would rise most by a step on the batch
    alone. That step, plain gradient descent with the optimizer's learning rate, is only imagined.

    Source: Aljundi et al., "Online Continual Learning with Maximally Interfered Retrieval", NeurIPS 2019.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep in a reservoir, at least one a class.
        replay_batch_size: samples, at least 1, replayed with each batch, over all devices.
        candidates: samples drawn from the buffer to choose from.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        candidates: int = 50,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size, replay_batch_size, **options)
        self.candidates = candidates

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of the batch and of the candidates that it would harm most."""
        assert self.replay_buffer is not None
        drawn = self.replay_buffer.draw(self.candidates)
        loss = self.loss_with_replay(batch, None if drawn is None else self._harmed(batch, drawn))
        self.remember(batch)
        return loss

    def _harmed(self, batch: Batch, drawn: Samples) -> Samples:
        if len(drawn[0]) <= self.replay_batch_size:
            return drawn
        x, targets, _ = batch
        with self.evaluating():
            gradients = self.gradients(self.mean_loss(self.seen_by_loss(self(x), targets), targets))
            groups = self.trainer.optimizers[0].param_groups
            rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
            imagined = {
                name: (parameter - rates.get(id(parameter), 0.0) * sum_over_ranks(gradient) / world_size()).detach()
                for (name, parameter), gradient in zip(self.trained_parameters().items(), gradients, strict=True)
            }
            with torch.no_grad():
                before = self.losses(self(drawn[0]), drawn[1])
                after = self.losses(functional_call(self, imagined, (drawn[0],)), drawn[1])
        chosen = most_interfered(before, after, self.replay_batch_size)
        return tuple(part[chosen] for part in drawn)
