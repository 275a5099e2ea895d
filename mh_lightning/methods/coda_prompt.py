"""CODA-Prompt: prompts that are sums of components, weighed by attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.errors import UserError, require
from mh_lightning.methods.base import Head
from mh_lightning.methods.prompting import PromptMethod


def orthogonality(rows: Tensor) -> Tensor:
    r"""How far rows R (m, k) are from orthonormal ones: the mean of :math:`(R R^T - I)^2`.

    Example:
        >>> orthogonality(torch.eye(2, 3)).item(), orthogonality(2 * torch.eye(2)).item()
        (0.0, 4.5)
    """
    identity = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    return (rows @ rows.T - identity).square().mean()


class Components(nn.Module):
    """Of each task: prompts (layers, m, l, d), keys and attention (layers, m, n), orthogonal at first."""

    def __init__(self, shape: tuple[int, int, int, int], num_features: int, num_tasks: int) -> None:
        super().__init__()
        layers, m, length, width = shape

        def drawn(size: int) -> list[Tensor]:
            every = [nn.init.orthogonal_(torch.empty(num_tasks * m, size)) for _ in range(layers)]
            return list(torch.split(torch.stack(every), m, dim=1))

        self.prompts = nn.ParameterList(part.reshape(shape).clone() for part in drawn(length * width))
        self.keys = nn.ParameterList(part.clone() for part in drawn(num_features))
        self.attention = nn.ParameterList(part.clone() for part in drawn(num_features))

    def so_far(self, parts: nn.ParameterList, begun: int) -> Tensor:
        """Of all tasks that have begun, (layers, begun * m, ...), of which only those of the last one learn."""
        kept = [one.detach() for one in [*parts][: begun - 1]]
        return torch.cat([*kept, parts[begun - 1]], dim=1)


class CODAPrompt(PromptMethod):
    r"""CODA-Prompt: the prefixes of a block are :math:`\sum_m \alpha_m P_m`, with
    :math:`\alpha_m = \cos(q \odot A_m, K_m)` of the query q. Each task brings components of its own; those of earlier
    tasks are frozen. The loss is also higher by :math:`\lambda` times the mean of :math:`(R R^T - I)^2` of prompts,
    keys and attention, in each block, which keeps components apart.

    Source: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
    Learning", CVPR 2023, equations 2 to 8. Components are drawn orthogonal to those of all tasks at the start, not when
    their task begins.

    Args:
        backbone: a frozen `mh_lightning.backbones.TimmBackbone` of a vision transformer.
        head: makes the head from the numbers of features and of classes.
        layers: blocks, from 0, that see prefixes.
        components: of each task, at least 1.
        length: tokens of a prompt, at least 2 and even: half of them are keys, half values.
        orthogonal: :math:`\lambda`, at least 0.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        layers: tuple[int, ...] = (0, 1, 2, 3, 4),
        components: int = 10,
        length: int = 8,
        orthogonal: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.components", components, at_least=1, whole=True)
        require("model.init_args.length", length, at_least=2, whole=True)
        require("model.init_args.orthogonal", orthogonal, at_least=0, below=math.inf)
        if length % 2:
            raise UserError(f"model.init_args.length={length} must be even: half are keys, half are values.")
        self.check_layers("layers", [*layers])
        self.layers, self.components, self.length, self.orthogonal = list(layers), components, length, orthogonal

    def make_prompts(self, num_tasks: int) -> Components:
        """Of all tasks."""
        shape = (len(self.layers), self.components, self.length, self.transformer.embed_dim)
        return Components(shape, self.backbone.num_features, num_tasks)

    def prompted(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """By the sums of the components so far, and how far these are from orthonormal ones."""
        assert isinstance(self.prompts, Components)
        begun = max(int(self.tasks_begun), 1)
        prompts, keys, attention = (
            self.prompts.so_far(parts, begun)
            for parts in (self.prompts.prompts, self.prompts.keys, self.prompts.attention)
        )
        half = self.length // 2
        prefixes = {}
        for place, layer in enumerate(self.layers):
            weights = F.cosine_similarity(query.unsqueeze(1) * attention[place], keys[place].unsqueeze(0), dim=2)
            prefix = torch.einsum("bm,mld->bld", weights, prompts[place])
            prefixes[layer] = (prefix[:, :half], prefix[:, half:])
        parts = [part for one in (prompts, keys, attention) for part in one.flatten(2)]
        loss = self.orthogonal * torch.stack([orthogonality(part) for part in parts]).sum()
        return self.features_with_prefixes(x, prefixes), loss.expand(len(x))
