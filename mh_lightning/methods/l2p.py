"""Learning to prompt: a pool of prompts, of which each image takes those whose keys are nearest."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.backbones.vit_tokens import embedded
from mh_lightning.errors import require
from mh_lightning.methods.base import Head
from mh_lightning.methods.prompting import PromptMethod


class PromptPool(nn.Module):
    """Prompts (m, l, d) and their keys (m, n)."""

    def __init__(self, pool_size: int, length: int, width: int, num_features: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(pool_size, length, width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(pool_size, num_features).uniform_(-1, 1))

    def nearest(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Prompts (b, count * l, d) of the keys with the largest cosine to queries (b, n), and the sums of these
        cosines, (b,).
        """
        cosines = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T
        best = cosines.topk(count, dim=1)
        return self.prompts[best.indices].flatten(1, 2), best.values.sum(dim=1)


class L2P(PromptMethod):
    r"""Learning to prompt: the image's tokens are joined by the `top_k` prompts of a pool whose keys have the largest
    cosine to the query; features are the mean of what comes out at the prompts. The loss is also lower by
    :math:`\lambda` times the sum of these cosines, so that keys come near to what chooses them.

    Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, equations 3 to 5.

    Args:
        backbone: a frozen `mh_lightning.backbones.TimmBackbone` of a vision transformer.
        head: makes the head from the numbers of features and of classes.
        pool_size: m, prompts in the pool, at least 1.
        length: l, tokens of a prompt, at least 1.
        top_k: prompts an image, at least 1 and at most `pool_size`.
        pull: :math:`\lambda`, at least 0.
        options: of `ContinualMethod`.
    """

    needs_task_borders = False  # the pool is that of all tasks

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        pool_size: int = 10,
        length: int = 5,
        top_k: int = 5,
        pull: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.pool_size", pool_size, at_least=1, whole=True)
        require("model.init_args.length", length, at_least=1, whole=True)
        require("model.init_args.top_k", top_k, at_least=1, at_most=pool_size, whole=True)
        require("model.init_args.pull", pull, at_least=0, below=math.inf)
        self.pool_size, self.length, self.top_k, self.pull = pool_size, length, top_k, pull

    def make_prompts(self, num_tasks: int) -> PromptPool:
        """One pool, whatever the tasks."""
        return PromptPool(self.pool_size, self.length, self.transformer.embed_dim, self.backbone.num_features)

    def prompted(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of what comes out at the prompts, and how far the keys are."""
        assert isinstance(self.prompts, PromptPool)
        prompts, cosines = self.prompts.nearest(query, self.top_k)
        tokens, prefix = embedded(self.transformer, x), self.transformer.num_prefix_tokens
        tokens = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)
        tokens = self.transformer.norm(self.transformer.blocks(tokens))
        features = self.transformer.fc_norm(tokens[:, prefix : prefix + prompts.shape[1]].mean(dim=1))
        return self.normalised(features), -self.pull * cosines
