"""Dark experience replay: kept samples remember what was answered to them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.distributed import gather_in_turn
from mh_lightning.errors import require
from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.replay_buffer import ReservoirBuffer, Samples


class LogitsBuffer(ReservoirBuffer):
    """A reservoir that keeps the logits of each sample, too; NaN for classes that were not known then.

    Attributes:
        logits: (capacity, C).
    """

    logits: Tensor

    def __init__(self, capacity: int, num_classes: int, seed: int = 0) -> None:
        super().__init__(capacity, num_classes, seed)
        self.register_buffer("logits", torch.zeros(capacity, num_classes))

    @property
    def parts(self) -> Samples:
        """What is kept of each sample."""
        return (*super().parts, self.logits)

    def grow(self, num_classes: int) -> None:
        """Keep samples of more classes."""
        new = num_classes - self.num_classes
        super().grow(num_classes)
        if new:
            unknown = self.logits.new_full((self.capacity, new), torch.nan)
            self.logits = torch.cat([self.logits, unknown], dim=1)


def distances(logits: Tensor, remembered: Tensor) -> Tensor:
    """Mean squared distances (b,) of logits (b, C) from remembered ones, over the classes of which these are known.

    Example:
        >>> distances(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, torch.nan]]))
        tensor([4.])
    """
    known = remembered.isfinite()
    squares = (logits.float() - remembered.where(known, 0)).square() * known
    return squares.sum(dim=1) / known.sum(dim=1)


class DER(ReplayMethod):
    r"""Dark experience replay: adds :math:`\alpha\, \mathrm{mean}\, (h(x') - z')^2` to the loss of a batch, of samples
    :math:`x'` from a reservoir and the logits :math:`z'` that were answered when they came. Samples are offered in
    every epoch, as learning goes on, so that a reservoir may hold one twice, with the answers of two times.

    Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020,
    equation 4.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn from the buffer for each batch, over all devices.
        alpha: at least 0.
        options: of `ContinualMethod`.
    """

    buffer_kind = LogitsBuffer

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        alpha: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size, replay_batch_size, **options)
        require("model.init_args.alpha", alpha, at_least=0, below=math.inf)
        self.alpha = alpha

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of the batch and of what is replayed."""
        replayed = self.drawn()
        x, targets, tasks = batch
        shares = [self.share(samples) for samples in replayed]
        logits, *old_logits = torch.split(
            self(torch.cat([x, *(share[0] for share in shares)])), [len(x), *(len(share[0]) for share in shares)]
        )
        loss = self.mean_loss(self.seen_by_loss(logits, targets), targets)
        for turn, (samples, share, old) in enumerate(zip(replayed, shares, old_logits, strict=True)):
            loss = loss + self.loss_of_replayed(turn, old, share, len(samples[0]))
        assert self.replay_buffer is not None
        self.replay_buffer.add(*gather_in_turn(x, targets, tasks, logits.detach().float()))
        return loss, logits

    def drawn(self) -> list[Samples]:
        """What is replayed with a batch, on all ranks alike."""
        assert self.replay_buffer is not None
        samples = self.replay_buffer.draw(self.replay_batch_size)
        return [] if samples is None else [samples]

    def loss_of_replayed(self, turn: int, logits: Tensor, share: Samples, rows: int) -> Tensor:
        """The weighed loss of what was drawn.

        Args:
            turn: which part of `drawn`.
            logits: of this rank's share, (s, C).
            share: the samples of this rank.
            rows: samples of all ranks.
        """
        return self.alpha * self.mean_over_samples(distances(logits, share[3]), rows)


class DERPlusPlus(DER):
    r"""DER++: adds :math:`\beta` times the loss of other samples from the reservoir, by their classes, too.

    Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020,
    equation 6.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn for each of the two losses for each batch, over all devices.
        alpha: weighs remembered logits, at least 0.
        beta: weighs classes, at least 0.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        alpha: float = 0.3,
        beta: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size, replay_batch_size, alpha, **options)
        require("model.init_args.beta", beta, at_least=0, below=math.inf)
        self.beta = beta

    def drawn(self) -> list[Samples]:
        """Samples for their logits, and others for their classes."""
        assert self.replay_buffer is not None
        others = self.replay_buffer.draw(self.replay_batch_size, turn=1)
        return super().drawn() + ([] if others is None else [others])

    def loss_of_replayed(self, turn: int, logits: Tensor, share: Samples, rows: int) -> Tensor:
        """By logits, then by classes."""
        if turn == 0:
            return super().loss_of_replayed(turn, logits, share, rows)
        return self.beta * self.mean_loss(logits, share[1], rows)
