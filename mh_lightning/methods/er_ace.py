"""Experience replay with an asymmetric cross-entropy."""

from typing import Any, Literal

from torch import nn

from mh_lightning.methods.base import Head
from mh_lightning.methods.experience_replay import ExperienceReplay


class ERACE(ExperienceReplay):
    """Experience replay whose new samples are told apart among the classes of their batch only, so that they push down
    no class that is not there; replayed samples are told apart among all classes.

    It is `ExperienceReplay` with another default of `classes_in_loss`.

    Source: Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning",
    ICLR 2022.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        buffer_size: samples to keep, at least one a class.
        replay_batch_size: samples, at least 1, drawn from the buffer for each batch, over all devices.
        classes_in_loss: whose logits the loss of a new sample sees, see `ContinualMethod`.
        options: of `ExperienceReplay`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        buffer_size: int,
        replay_batch_size: int = 10,
        classes_in_loss: Literal["all", "task", "batch"] = "batch",
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, buffer_size, replay_batch_size, classes_in_loss=classes_in_loss, **options)
