"""Adapters: small networks beside the layers of a backbone."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mh_lightning.backbones.peft.base import Peft
from mh_lightning.errors import UserError, require


class Bottleneck(nn.Module):
    r"""A layer f, and :math:`s\, U \mathrm{relu}(D x)` of a bottleneck, with :math:`U = 0` at first.

    Args:
        layer: f.
        width: channels of what the bottleneck takes and gives.
        bottleneck: channels between D and U, at least 1.
        scale: s, above 0.
        maps: whether it works on maps (b, channels, height, width), after the layer instead of beside it.
    """

    def __init__(self, layer: nn.Module, width: int, bottleneck: int, scale: float, maps: bool) -> None:
        super().__init__()
        self.layer, self.scale, self.maps = layer, scale, maps
        self.down: nn.Module = nn.Conv2d(width, bottleneck, 1) if maps else nn.Linear(width, bottleneck)
        up = nn.Conv2d(bottleneck, width, 1) if maps else nn.Linear(bottleneck, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)  # type: ignore[arg-type]
        self.up: nn.Module = up
        self.activation = nn.ReLU()

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The sum of both."""
        y: Tensor = self.layer(x, *args, **options)
        added: Tensor = self.up(self.activation(self.down(y if self.maps else x)))
        return y + self.scale * added


@dataclass(frozen=True)
class Adapters(Peft):
    r"""AdaptFormer: beside the MLP of each block of a transformer, a bottleneck :math:`s\, U \mathrm{relu}(D x)` of
    trained matrices D (m, d) and U (d, m). In a convolutional network, the same of 1x1 convolutions, on the map y that
    each stage gives: :math:`y + s\, U \mathrm{relu}(D y)`.

    Args:
        bottleneck: m, at least 1.
        scale: s, above 0.

    Raises:
        UserError: if an option is out of range.

    Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022,
    equations 3 and 4.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=0)
        >>> Adapters(bottleneck=2).add_to(model)
        >>> model.blocks[0].mlp.down
        Linear(in_features=64, out_features=2, bias=True)
    """

    bottleneck: int = 16
    scale: float = 0.1

    def __post_init__(self) -> None:
        require("backbone.peft: Adapters.bottleneck", self.bottleneck, at_least=1, whole=True)
        require("backbone.peft: Adapters.scale", self.scale, above=0, below=math.inf)

    def add_to(self, model: nn.Module) -> None:
        """See `Peft`."""
        model.requires_grad_(False)
        whole: Any = model
        blocks = [block for block in getattr(whole, "blocks", ()) if isinstance(getattr(block, "mlp", None), nn.Module)]
        if blocks and isinstance(getattr(whole, "embed_dim", None), int):
            for block in blocks:
                block.mlp = Bottleneck(block.mlp, whole.embed_dim, self.bottleneck, self.scale, maps=False)
            return
        stages = [(stage["module"], stage["num_chs"]) for stage in getattr(whole, "feature_info", ())]
        found = [(name, width) for name, width in stages if _holds(model, name)]
        if not found:
            raise UserError(
                "backbone.peft: Adapters needs a transformer with blocks, or a convolutional network whose stages timm "
                "tells; take LoRA or ScaleAndShift."
            )
        for name, width in found:
            parent, _, child = name.rpartition(".")
            holder = model.get_submodule(parent)
            adapted = Bottleneck(model.get_submodule(name), width, self.bottleneck, self.scale, maps=True)
            setattr(holder, child, adapted)


def _holds(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())
