"""What methods share that learn from the model as it was before a task, their teacher."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mh_lightning.backbones.base import mode_of
from mh_lightning.growth import grown
from mh_lightning.methods.base import ContinualMethod, Head
from mh_lightning.methods.quadratic_penalty import TensorsOfParameters


def distillation_losses(logits: Tensor, told: Tensor, temperature: float) -> Tensor:
    r"""How far a student's answers are from those of its teacher:
    :math:`T^2\, \mathrm{KL}(\mathrm{softmax}(t / T) \| \mathrm{softmax}(s / T))`.

    Args:
        logits: s, (b, k).
        told: t, (b, k), the teacher's.
        temperature: T, above 0.

    Returns:
        (b,).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Example:
        >>> distillation_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 9.0]]), 2.0)
        tensor([0.])
    """
    student, teacher = (F.log_softmax(part.float() / temperature, dim=1) for part in (logits, told))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


class DistillingMethod(ContinualMethod):
    """A method that keeps a copy of the model, as it was when the last task ended: of the head, and of what is trained
    of the backbone.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        options: of `ContinualMethod`.

    Attributes:
        teacher: None before the first task has ended.
    """

    def __init__(self, backbone: nn.Module, head: Head, **options: Any) -> None:
        super().__init__(backbone, head, **options)
        self.teacher: nn.ModuleDict | None = None

    def make_module(self, name: str) -> nn.Module:
        """A teacher that knows what the model knows now."""
        if name != "teacher":
            return super().make_module(name)
        assert self.head is not None
        taught: dict[str, nn.Module] = {"head": copy.deepcopy(self.head)}
        changing = self._changing()
        if changing:
            taught["backbone"] = kept = TensorsOfParameters(changing)
            kept.copy_from(changing)
        return nn.ModuleDict(taught).requires_grad_(False).eval()

    def _changing(self) -> dict[str, Tensor]:
        """What learning changes of the backbone: trained parameters, and buffers beside them."""
        trained = {name: one.detach() for name, one in self.backbone.named_parameters() if one.requires_grad}
        return trained | dict(self.backbone.named_buffers()) if trained else {}

    def grow_parts(self) -> None:
        """A teacher has outputs of new classes, too, which nobody asks for."""
        super().grow_parts()
        if self.teacher is not None:
            self.teacher["head"] = grown(self.teacher["head"], self.stream.num_classes).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DistillingMethod":
        """A teacher never trains."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def told(self, x: Tensor, features: Tensor) -> Tensor:
        """The teacher's logits (b, C).

        Args:
            x: inputs, (b, ...).
            features: of the model's backbone, (b, n), which are the teacher's where the backbone is frozen.
        """
        assert self.teacher is not None
        kept = dict(self.teacher.items()).get("backbone")
        if isinstance(kept, TensorsOfParameters) and len(x):
            values = {name: kept[name] for name in self._changing()}
            with mode_of(self.backbone, training=False):
                features = functional_call(self.backbone, values, (x,))
        logits: Tensor = self.teacher["head"](features)
        return logits

    def on_task_end(self, task: int) -> None:
        """What the model knows now is what the next task shall keep."""
        self.teacher = self.make_module("teacher")  # type: ignore[assignment]
