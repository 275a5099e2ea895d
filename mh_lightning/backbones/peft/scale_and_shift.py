"""SSF: each layer's output is scaled and shifted, channel by channel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mh_lightning.backbones.peft.base import Peft
from mh_lightning.compat.torch_names import BatchNorm
from mh_lightning.errors import UserError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, BatchNorm)


class Scaled(nn.Module):
    """A weight (outputs, ...) times a number for each output, 1 at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(weight.flatten(1)[:, 0] if weight.dim() > 1 else weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer works with."""
        return weight * self.scale.view(-1, *[1] * (weight.dim() - 1))


class Shifted(nn.Module):
    """A bias (outputs,) plus a number for each output, 0 at first."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor) -> Tensor:
        """The bias that the layer works with."""
        return bias + self.shift


@dataclass(frozen=True)
class ScaleAndShift(Peft):
    r"""SSF: the output y of each linear layer, convolution and normalisation becomes :math:`\gamma \odot y + \beta`,
    with :math:`\gamma` and :math:`\beta` trained, a number each for every channel. It is put into weights and biases:
    :math:`\gamma W x + (b + \beta)`, which is as general. Where a layer has no bias, the normalisation that follows it
    shifts.

    Source: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022,
    equations 2 and 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        >>> ScaleAndShift().add_to(model)
        >>> sum(one.numel() for one in model.parameters() if one.requires_grad)
        16
    """

    merges: ClassVar[bool] = True

    def add_to(self, model: nn.Module) -> None:
        """See `Peft`."""
        model.requires_grad_(False)
        layers = [module for module in model.modules() if isinstance(module, LAYERS) and module.weight is not None]
        if not layers:
            raise UserError("backbone.peft: ScaleAndShift needs linear layers, convolutions or normalisations.")
        for module in layers:
            parametrize.register_parametrization(module, "weight", Scaled(module.weight))
            if module.bias is not None:
                parametrize.register_parametrization(module, "bias", Shifted(module.bias))
