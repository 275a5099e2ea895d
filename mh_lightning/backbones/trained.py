"""What backbones that can be trained or frozen have in common: how the optimizer treats them, and their mode."""

import math
from dataclasses import dataclass
from typing import Any, Self

from mh_lightning.backbones.base import Backbone, ParameterGroup
from mh_lightning.compat.torch_names import BatchNorm
from mh_lightning.errors import UserError, require


@dataclass(frozen=True)
class TrainingOptions:
    """Options on how a backbone is trained and run, which its features do not depend on."""

    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
    layer_decay: float | None = None
    frozen_batch_norm: bool = False
    compile: bool = False

    def optimizer_settings(self) -> dict[str, Any]:
        """Those that the optimizer minds, where they are given."""
        options = {
            "learning_rate_factor": None if self.learning_rate_factor == 1 else self.learning_rate_factor,
            "weight_decay": self.weight_decay,
            "layer_decay": self.layer_decay,
        }
        return {name: value for name, value in options.items() if value is not None}

    def check(self, frozen: bool) -> None:
        """Refuse values that make no sense, or none for a frozen backbone.

        Raises:
            UserError: names the option.
        """
        given = self.optimizer_settings()
        for name in ("learning_rate_factor", "weight_decay"):
            require(f"backbone.{name}", given.get(name), at_least=0, below=math.inf)
        require("backbone.layer_decay", self.layer_decay, above=0, at_most=1)
        if frozen and given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"backbone.{name}={value} is for a backbone that is trained, and backbone.frozen=true; set "
                f"frozen=false, or leave {name} out."
            )

    def feature_fingerprint(self) -> None:
        """Nothing that features depend on."""


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from: timm's own, or a file, mapped by order or by names; and whether checkpoints of a frozen
    backbone hold them nevertheless. Features depend on the weights, not on that.
    """

    pretrained: bool = False
    checkpoint_path: str | None = None
    map_by_order: bool = False
    in_checkpoints: bool = False

    @property
    def is_known(self) -> bool:
        """Whether they come from anywhere but a random generator."""
        return self.pretrained or self.checkpoint_path is not None

    def feature_fingerprint(self) -> None:
        """Nothing that features depend on."""


class TrainedBackbone(Backbone):
    """A backbone that the optimizer treats by `TrainingOptions`, unless it is frozen.

    Args:
        options: how it is trained.
        frozen: it has no gradient and stays in evaluation mode.
    """

    def __init__(self, options: TrainingOptions, frozen: bool) -> None:
        super().__init__()
        options.check(frozen)
        self._training_options, self.frozen = options, frozen
        self.has_learnt = False

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a frozen backbone, or its frozen batch-norm layers, stay in evaluation mode."""
        super().train(mode and not self.frozen)
        if self._training_options.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self

    def finish_training(self) -> None:
        """From now on it is frozen, and checkpoints hold its weights."""
        self.frozen = self.has_learnt = True
        super().finish_training()

    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters, with the learning rate's factor and the weight decay of the options."""
        (group,) = super().parameter_groups()
        options = self._training_options
        return [ParameterGroup(group.parameters, options.learning_rate_factor, options.weight_decay)]

    def optimizer_settings(self) -> dict[str, Any]:
        """The learning rate's factor, weight decay and layer decay, where they are given."""
        return self._training_options.optimizer_settings()
