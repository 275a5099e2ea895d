"""DualPrompt: prompts that all tasks share, and prompts of each task, found by a key."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.errors import require
from mh_lightning.methods.base import Head
from mh_lightning.methods.prompting import PromptMethod


class DualPrompts(nn.Module):
    """General prefixes (layers, 2, l, d), and of each task expert ones and a key (n,); keys and values, each."""

    def __init__(self, general: tuple[int, ...], expert: tuple[int, ...], num_features: int, num_tasks: int) -> None:
        super().__init__()
        self.general = nn.Parameter(torch.empty(general).uniform_(-1, 1))
        self.experts = nn.ParameterList(torch.empty(expert).uniform_(-1, 1) for _ in range(num_tasks))
        self.keys = nn.ParameterList(torch.empty(num_features).uniform_(-1, 1) for _ in range(num_tasks))


class DualPrompt(PromptMethod):
    r"""DualPrompt: some blocks of the transformer see prefixes that all tasks share, others those of the task. Each
    task has a key, which is pulled to its queries by :math:`-\lambda \cos(q, k_t)`; in evaluation, an image takes the
    prefixes of the task whose key has the largest cosine to its query.

    Source: Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022,
    section 4.

    Args:
        backbone: a frozen `mh_lightning.backbones.TimmBackbone` of a vision transformer.
        head: makes the head from the numbers of features and of classes.
        general_layers: blocks, from 0, that see what all tasks share.
        expert_layers: blocks that see what is the task's own.
        general_length: tokens of a shared prefix, at least 1.
        expert_length: tokens of a task's prefix, at least 1.
        pull: :math:`\lambda`, at least 0.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        general_layers: tuple[int, ...] = (0, 1),
        expert_layers: tuple[int, ...] = (2, 3, 4),
        general_length: int = 5,
        expert_length: int = 20,
        pull: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.general_length", general_length, at_least=1, whole=True)
        require("model.init_args.expert_length", expert_length, at_least=1, whole=True)
        require("model.init_args.pull", pull, at_least=0, below=math.inf)
        self.check_layers("general_layers and expert_layers", [*general_layers, *expert_layers])
        self.general_layers, self.expert_layers = list(general_layers), list(expert_layers)
        self.general_length, self.expert_length, self.pull = general_length, expert_length, pull

    def make_prompts(self, num_tasks: int) -> DualPrompts:
        """Of all tasks."""
        width = self.transformer.embed_dim
        general = (len(self.general_layers), 2, self.general_length, width)
        expert = (len(self.expert_layers), 2, self.expert_length, width)
        return DualPrompts(general, expert, self.backbone.num_features, num_tasks)

    def prompted(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """In training by the task's prompts, in evaluation by those of the nearest key."""
        assert isinstance(self.prompts, DualPrompts)
        begun = max(int(self.tasks_begun), 1)
        if self.training:
            cosines = F.cosine_similarity(query, self.prompts.keys[begun - 1], dim=1)
            experts = self.prompts.experts[begun - 1].expand(len(x), -1, -1, -1, -1)
        else:
            keys = F.normalize(torch.stack([*self.prompts.keys][:begun]), dim=1)
            cosines, nearest = (F.normalize(query, dim=1) @ keys.T).max(dim=1)
            experts = torch.stack([*self.prompts.experts][:begun])[nearest]
        prefixes = {
            layer: (keys_and_values[0].expand(len(x), -1, -1), keys_and_values[1].expand(len(x), -1, -1))
            for layer, keys_and_values in zip(self.general_layers, self.prompts.general, strict=True)
        }
        for place, layer in enumerate(self.expert_layers):
            prefixes[layer] = (experts[:, place, 0], experts[:, place, 1])
        return self.features_with_prefixes(x, prefixes), -self.pull * cosines
