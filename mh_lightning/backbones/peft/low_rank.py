"""LoRA: a product of two narrow matrices beside each weight."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mh_lightning.backbones.peft.base import Peft
from mh_lightning.errors import UserError, require


class LowRankSum(nn.Module):
    r"""A weight :math:`W + \frac{\alpha}{r} B A`, with :math:`B = 0` at first.

    Args:
        weight: W, (outputs, ...), seen as a matrix (outputs, inputs).
        rank: r, at least 1.
        alpha: above 0, of the product's scale.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.down = nn.Parameter(nn.init.kaiming_uniform_(weight.new_empty(rank, inputs), a=math.sqrt(5)))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer works with."""
        return weight + self.scale * (self.up @ self.down).view_as(weight)


@dataclass(frozen=True)
class LoRA(Peft):
    r"""Low-rank adaptation: each weight W of linear layers and of convolutions without groups becomes
    :math:`W + \frac{\alpha}{r} B A`, with B (outputs, r) and A (r, inputs) trained. In transformers those of attention
    alone, unless `everywhere`.

    Args:
        rank: r, at least 1, and at most the width of each of these layers.
        alpha: above 0.
        everywhere: also the linear layers of a transformer that are not in its attention.

    Raises:
        UserError: if an option is out of range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> LoRA(rank=2).add_to(model)
        >>> [tuple(one.shape) for one in model.parameters() if one.requires_grad]
        [(2, 6), (4, 2)]
    """

    merges: ClassVar[bool] = True
    rank: int = 4
    alpha: float = 8.0
    everywhere: bool = False

    def __post_init__(self) -> None:
        require("backbone.peft: LoRA.rank", self.rank, at_least=1, whole=True)
        require("backbone.peft: LoRA.alpha", self.alpha, above=0, below=math.inf)

    def add_to(self, model: nn.Module) -> None:
        """See `Peft`."""
        model.requires_grad_(False)
        layers = {name: module for name, module in model.named_modules() if _has_matrix(module)}
        attention = {name: module for name, module in layers.items() if ".attn." in f".{name}."}
        chosen = layers if self.everywhere or not attention else attention
        if not chosen:
            raise UserError("backbone.peft: LoRA needs linear layers or convolutions, and the model has none.")
        for name, module in chosen.items():
            weight: Tensor = module.weight
            width = min(len(weight), weight[0].numel())
            if self.rank > width:
                raise UserError(
                    f"backbone.peft: LoRA.rank={self.rank} is above the width {width} of {name or 'the layer'}; take "
                    f"{width} or less."
                )
        for module in chosen.values():
            parametrize.register_parametrization(module, "weight", LowRankSum(module.weight, self.rank, self.alpha))


def _has_matrix(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1
    return convolution or isinstance(module, nn.Linear)
