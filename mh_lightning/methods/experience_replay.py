"""Experience replay: each batch is learnt together with samples of the past."""

from typing import Any, Literal

from torch import Tensor, nn

from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.replay_buffer import RandomReplacementBuffer, ReservoirBuffer


class ExperienceReplay(ReplayMethod):
    """Adds the mean loss of samples drawn from a buffer to the batch's own.

    Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn from the buffer for each batch, over all devices.
        replacement: "reservoir" (all samples of the stream are as likely to be kept) or "random" (each new sample
            replaces a random one, so that the newest prevail).
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        replacement: Literal["reservoir", "random"] = "reservoir",
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size, replay_batch_size, **options)
        self.replacement = replacement
        self.buffer_kind = {"reservoir": ReservoirBuffer, "random": RandomReplacementBuffer}[replacement]

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of the batch and of what is replayed."""
        assert self.replay_buffer is not None
        loss = self.loss_with_replay(batch, self.replay_buffer.draw(self.replay_batch_size))
        self.remember(batch)
        return loss
