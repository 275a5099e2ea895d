"""A vision transformer of timm step by step, for methods that put something between its steps."""

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


def embedded(model: nn.Module, x: Tensor) -> Tensor:
    """Tokens (b, t, d) before the first block, of images (b, channels, height, width)."""
    vit: Any = model
    tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    return tokens


def pooled(model: nn.Module, tokens: Tensor) -> Tensor:
    """Features (b, n) of tokens (b, t, d) after the last block, as the model itself makes them."""
    vit: Any = model
    features: Tensor = vit.forward_head(vit.norm(tokens), pre_logits=True)
    return features


def takes_prefixes(block: nn.Module) -> bool:
    """Whether a block has the attention that `with_prefix` works with."""
    return isinstance(block, Block) and isinstance(block.attn, Attention)


def with_prefix(block: nn.Module, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens (b, t, d) after a block whose attention also sees given keys and values (prefix tuning).

    Args:
        block: of a vision transformer.
        tokens: (b, t, d).
        keys: (b, l, d), as they come from the block's projection.
        values: (b, l, d).

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
    """
    part: Any = block
    attention = part.attn
    y = part.norm1(tokens)
    b, t, d = y.shape

    def by_head(one: Tensor) -> Tensor:
        return one.reshape(b, -1, attention.num_heads, d // attention.num_heads).transpose(1, 2)

    q, k, v = (by_head(one) for one in attention.qkv(y).chunk(3, dim=2))
    k, v = torch.cat([by_head(keys), k], dim=2), torch.cat([by_head(values), v], dim=2)
    y = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v)
    y = y.transpose(1, 2).reshape(b, t, d)
    y = attention.proj(getattr(attention, "norm", nn.Identity())(y))
    tokens = tokens + part.drop_path1(part.ls1(y))
    last: Tensor = tokens + part.drop_path2(part.ls2(part.mlp(part.norm2(tokens))))
    return last
