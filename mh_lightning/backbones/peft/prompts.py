"""Visual prompts: learnt tokens beside those of the image."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from mh_lightning.backbones.peft.base import Peft
from mh_lightning.errors import UserError, require


class Prompted(nn.Module):
    """A block of a transformer that sees more tokens.

    Args:
        block: maps tokens (b, t, d) to as many.
        prompts: (l, d) tokens, put after the first `prefix` ones; None adds no more.
        prefix: class and register tokens.
        drops: tokens that are taken out again after the block.
    """

    def __init__(self, block: nn.Module, prompts: nn.Parameter | None, prefix: int, drops: int) -> None:
        super().__init__()
        self.block, self.prompts, self.prefix, self.drops = block, prompts, prefix, drops

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The block's tokens, (b, t, d) if all prompts are taken out again."""
        if self.prompts is not None:
            more = self.prompts.expand(len(x), -1, -1)
            x = torch.cat([x[:, : self.prefix], more, x[:, self.prefix :]], dim=1)
        x = self.block(x, *args, **options)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.drops :]], dim=1) if self.drops else x


@dataclass(frozen=True)
class VisualPrompts(Peft):
    """VPT: learnt tokens that a vision transformer sees beside those of the image: new ones in each block ("deep"), or
    only before the first, from where they go on with the others.

    Args:
        tokens: prompts, at least 1, a block.
        deep: new ones in each block.

    Raises:
        UserError: if an option is out of range.

    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, equations 4 to 7.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=0)
        >>> VisualPrompts(tokens=3).add_to(model)
        >>> [tuple(one.shape) for one in model.parameters() if one.requires_grad] == [(3, 64)] * len(model.blocks)
        True
    """

    tokens: int = 5
    deep: bool = True

    def __post_init__(self) -> None:
        require("backbone.peft: VisualPrompts.tokens", self.tokens, at_least=1, whole=True)

    def add_to(self, model: nn.Module) -> None:
        """See `Peft`."""
        whole: Any = model
        if not has_tokens(model):
            raise UserError(
                f"backbone.peft: VisualPrompts are tokens, and {type(model).__name__} has none; take a vision "
                "transformer, or LoRA, ScaleAndShift or Adapters."
            )
        model.requires_grad_(False)
        width, prefix = whole.embed_dim, whole.num_prefix_tokens
        blocks = list(whole.blocks)
        bound = math.sqrt(6 / (width + math.prod(whole.patch_embed.patch_size) * 3))

        def drawn() -> nn.Parameter:
            return nn.Parameter(torch.empty(self.tokens, width).uniform_(-bound, bound))

        if self.deep:
            wrapped = [Prompted(block, drawn(), prefix, self.tokens) for block in blocks]
        else:
            wrapped = [Prompted(block, None, prefix, 0) for block in blocks]
            wrapped[0].prompts, wrapped[-1].drops = drawn(), self.tokens
        whole.blocks = nn.Sequential(*wrapped)


def has_tokens(model: nn.Module) -> bool:
    """Whether a model is a `VisionTransformer` of timm, whose blocks map tokens (b, t, d)."""
    return isinstance(model, VisionTransformer)
