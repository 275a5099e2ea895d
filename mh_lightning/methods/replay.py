"""What methods with a replay buffer share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.distributed import gather_in_turn, process_rank, world_size
from mh_lightning.errors import require
from mh_lightning.methods.base import Batch, ContinualMethod, Head
from mh_lightning.methods.replay_buffer import ReplayBuffer, ReservoirBuffer, Samples
from mh_lightning.random_numbers import global_seed


class ReplayMethod(ContinualMethod):
    """A method that keeps samples of the stream, offered to its buffer in the first epoch of their task.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn from the buffer for each batch, over all devices.
        options: of `ContinualMethod`.
    """

    buffer_kind: Callable[..., ReplayBuffer] = ReservoirBuffer

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.replay_batch_size", replay_batch_size, at_least=1, whole=True)
        self.buffer_size, self.replay_batch_size = buffer_size, replay_batch_size
        self.replay_buffer: ReplayBuffer | None = None

    def make_parts(self) -> None:
        """Make the head and the buffer."""
        super().make_parts()
        self.replay_buffer = self.buffer_kind(self.buffer_size, self.stream.num_classes)

    def grow_parts(self) -> None:
        """A head and a buffer for more classes."""
        super().grow_parts()
        assert self.replay_buffer is not None
        self.replay_buffer.grow(self.stream.num_classes)

    def configure_model(self) -> None:
        """Make the parts, once; what is kept when a fit goes on is of earlier tasks."""
        super().configure_model()
        assert self.replay_buffer is not None
        self.replay_buffer.seed = global_seed() or 0  # of this fit, also where the method was loaded before
        if self.goes_on:
            self.replay_buffer.begin_stream()
        self.replay_buffer.make_room(self.stream.first_input().shape[1:])

    def remember(self, batch: Batch) -> None:
        """Offer a batch, and that of the other ranks, to the buffer; in the first epoch of a task."""
        assert self.replay_buffer is not None
        if not self.trainer.current_epoch % self.stream.epochs_per_task:
            self.replay_buffer.add(*gather_in_turn(*batch))
        else:
            self.replay_buffer.pass_by(self.rows_of(batch))

    def rows_of(self, batch: Batch) -> int:
        """Samples of a batch of the stream, or of a chunk, over all ranks."""
        return len(batch[1]) if world_size() == 1 else self.rows_of_batch

    def share(self, samples: Samples) -> Samples:
        """The part for this rank, which may be empty, of samples that all ranks have drawn alike."""
        return tuple(part[process_rank() :: world_size()] for part in samples)

    def joined(self, batch: Batch, replayed: Samples | None) -> tuple[Tensor, Tensor, int]:
        """Inputs and classes of a batch and of what is replayed with it, as far as they are this rank's, the batch's
        first; and how many samples that are over all ranks.

        Args:
            batch: this rank's share.
            replayed: the samples of all ranks.
        """
        (x, targets, _), rows = batch, self.rows_of(batch)
        if replayed is None:
            return x, targets, rows
        old_x, old_targets, *_ = self.share(replayed)
        return torch.cat([x, old_x]), torch.cat([targets, old_targets]), rows + len(replayed[1])

    def loss_with_replay(self, batch: Batch, replayed: Samples | None) -> tuple[Tensor, Tensor]:
        """Sum of the mean losses of a batch and of replayed samples, and the batch's logits (b, C).

        Args:
            batch: this rank's share.
            replayed: the samples of all ranks.
        """
        if replayed is None:
            return ContinualMethod.training_loss(self, batch)
        (x, targets, _), (old_x, old_targets, *_) = batch, self.share(replayed)
        logits = self(torch.cat([x, old_x]))
        logits, old_logits = logits[: len(x)], logits[len(x) :]
        new_loss = self.mean_loss(self.seen_by_loss(logits, targets), targets)
        return new_loss + self.mean_loss(old_logits, old_targets, len(replayed[1])), logits

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of the trainable parameters on this rank, zeros where there is none."""
        trained = self.trained_parameters()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            for parameter, gradient in zip(trained.values(), found, strict=True)
        ]
