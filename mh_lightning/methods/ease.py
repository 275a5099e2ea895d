"""EASE: each task has adapters of its own, and classes are told apart by prototypes in all their feature spaces."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mh_lightning.backbones import Adapters, TimmBackbone
from mh_lightning.backbones.peft.adapters import Bottleneck
from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError, require
from mh_lightning.methods.base import ContinualMethod, Head
from mh_lightning.methods.task_samples import batches_of_task
from mh_lightning.random_numbers import seed_from

SHARPNESS = 10.0  # of the softmax of sums of cosines


def synthesised(old: Tensor, new: Tensor, new_in_its_space: Tensor) -> Tensor:
    r"""Prototypes of old classes in a new feature space, from those of the new classes that are like them:
    :math:`\hat p_i = \sum_j \mathrm{softmax}_j(\cos(p_i, p_j))\, p'_j`.

    Args:
        old: of old classes in their own space, (o, n).
        new: of new classes in that space, (k, n).
        new_in_its_space: of new classes in the new space, (k, n).

    Source: Zhou et al., CVPR 2024, equations 8 to 10.

    Example:
        >>> old, new = torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> synthesised(old, new, torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([[1., 2.]])
    """
    similarities = F.normalize(old, dim=1) @ F.normalize(new, dim=1).T
    return similarities.softmax(dim=1) @ new_in_its_space


class EASE(ContinualMethod):
    r"""Expandable subspace ensemble: each task trains new adapters and a head on its own classes, and leaves a feature
    space and the mean features of its classes, their prototypes, in all spaces so far. Prototypes of earlier classes in
    the new space are inferred from those of new classes that are like them. A class c of task t answers by
    :math:`\cos(p_{c,t}, f_t) + \alpha \sum_{s \ne t} \cos(p_{c,s}, f_s)`, with the image's features :math:`f_s` in each
    space.

    Source: Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning", CVPR
    2024.

    Args:
        backbone: a `mh_lightning.backbones.TimmBackbone` with ``peft: Adapters``.
        head: makes the head that adapters are trained with, from the numbers of features and of classes.
        alpha: at least 0.
        classes_in_loss: whose logits the loss of a sample sees, see `ContinualMethod`.
        options: of `ContinualMethod`; ``reset_optimizer: true`` is as published.

    Attributes:
        adapters: parameters of the adapters of each task, (T, p).
        prototypes: (C, T, n).
        task_of_class: (C,), from 0; -1 for classes to come.

    Raises:
        UserError: if the backbone has no adapters.
    """

    answers_from_features = False
    adapters: Tensor
    prototypes: Tensor
    task_of_class: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        alpha: float = 0.1,
        classes_in_loss: Literal["all", "task", "batch"] = "task",
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, classes_in_loss=classes_in_loss, **options)
        if not isinstance(self.backbone, TimmBackbone) or not isinstance(self.backbone.peft, Adapters):
            raise UserError("model.init_args.backbone: EASE trains adapters; give a TimmBackbone with peft: Adapters.")
        require("model.init_args.alpha", alpha, at_least=0, below=math.inf)
        self.alpha = alpha

    def make_parts(self) -> None:
        """Make the head, and room for all tasks."""
        super().make_parts()
        tasks, classes = len(self.stream.learnt().class_groups), self.stream.num_classes
        size = sum(parameter.numel() for parameter in self._trained().values())
        self.register_buffer("adapters", torch.zeros(tasks, size))
        self.register_buffer("prototypes", torch.zeros(classes, tasks, self.backbone.num_features))
        self.register_buffer("task_of_class", torch.full((classes,), -1))

    def grow_parts(self) -> None:
        """Room for more tasks and classes."""
        super().grow_parts()
        tasks, classes = len(self.stream.learnt().class_groups), self.stream.num_classes
        more_tasks, more_classes = tasks - len(self.adapters), classes - len(self.prototypes)
        self.adapters = F.pad(self.adapters, (0, 0, 0, more_tasks))
        self.prototypes = F.pad(self.prototypes, (0, 0, 0, more_tasks, 0, more_classes))
        self.task_of_class = F.pad(self.task_of_class, (0, more_classes), value=-1)

    def on_fit_start(self) -> None:
        """Refuse classes that belong to several tasks."""
        groups = self.stream.learnt().class_groups
        if sum(map(len, groups)) != self.stream.num_classes:
            raise UserError(
                f"data.scenario={self.stream.scenario}: EASE has adapters for each task, so each class must belong to "
                "one task, those of an earlier fit included; use CI, and new classes."
            )
        super().on_fit_start()

    def on_task_start(self, task: int) -> None:
        """Begin with adapters that change nothing."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed_from(self._place(task)))
            for module in self.backbone.modules():
                if isinstance(module, Bottleneck):
                    fresh = Bottleneck(nn.Identity(), *_sizes(module), module.scale, module.maps)
                    for name in ("down", "up"):
                        getattr(module, name).load_state_dict(getattr(fresh, name).state_dict())

    @torch.no_grad()
    def on_task_end(self, task: int) -> None:
        """Keep the adapters, and the prototypes in all spaces so far."""
        place, classes = self._place(task), self.stream.class_groups[task]
        self.adapters[place] = torch.cat([one.detach().flatten() for one in self._trained().values()])
        sums, counts = torch.zeros_like(self.prototypes[:, : place + 1]), torch.zeros_like(self.prototypes[:, 0, 0])
        with self.evaluating():
            for x, targets, _ in batches_of_task(self, task, "Prototypes"):
                with self.trainer.precision_plugin.forward_context():
                    sums.index_add_(0, targets, self.features_in_spaces(x, place + 1).to(sums.dtype))
                counts += torch.bincount(targets, minlength=len(counts))
        sums, counts = sum_over_ranks(sums), sum_over_ranks(counts)
        self.prototypes[classes, : place + 1] = sums[classes] / counts[classes, None, None]
        old = (self.task_of_class >= 0).nonzero().flatten()
        for earlier in sorted({*self.task_of_class[old].tolist()}):
            those = old[self.task_of_class[old] == earlier]
            new = self.prototypes[classes]
            self.prototypes[those, place] = synthesised(self.prototypes[those, earlier], new[:, earlier], new[:, place])
        self.task_of_class[classes] = place

    def features_in_spaces(self, x: Tensor, spaces: int) -> Tensor:
        """Features (b, spaces, n) of images, by the adapters of each of the first tasks."""
        if not len(x):
            return x.new_zeros(0, spaces, self.backbone.num_features)
        names, found = self._trained(), []
        for flat in self.adapters[:spaces]:
            parts = torch.split(flat, [one.numel() for one in names.values()])
            weights = {name: part.view_as(one) for part, (name, one) in zip(parts, names.items(), strict=True)}
            found.append(functional_call(self.backbone, weights, (x,)))
        return torch.stack(found, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C): in training, and before the first task has ended, those of the head."""
        spaces = int(self.task_of_class.max()) + 1
        if self.training or not spaces:
            return super().forward(x)
        features = F.normalize(self.features_in_spaces(x, spaces), dim=2)
        cosines = torch.einsum("bsn,csn->bcs", features, F.normalize(self.prototypes[:, :spaces], dim=2))
        own = F.one_hot(self.task_of_class.clamp_min(0), spaces).to(cosines.dtype)
        logits = SHARPNESS * (cosines * (own + self.alpha * (1 - own))).sum(dim=2)
        return logits.masked_fill(self.task_of_class < 0, torch.finfo(logits.dtype).min / 2)

    def answering_head(self) -> nn.Module:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError("EASE passes each image through the adapters of all tasks, and cannot be exported.")

    def _place(self, task: int) -> int:
        return self.stream.num_earlier_tasks + task

    def _trained(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.backbone.named_parameters() if one.requires_grad}


def _sizes(module: Bottleneck) -> tuple[int, int]:
    weight: Any = module.down.weight
    return weight.shape[1], weight.shape[0]
