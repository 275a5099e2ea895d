"""Synaptic intelligence: parameters are held by what their way has done for the loss."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import require
from mh_lightning.methods.base import Head
from mh_lightning.methods.quadratic_penalty import QuadraticPenaltyMethod, TensorsOfParameters


class SynapticIntelligence(QuadraticPenaltyMethod):
    r"""Adds the penalty :math:`c \sum_i \Omega_i (\theta_i - \theta^*_i)^2` to each step. While a task is learnt,
    :math:`\omega_i = - \sum_t g_{t,i} \Delta_{t,i}` adds up how far each step's move :math:`\Delta_t` has lowered the
    task's loss, whose gradient without the penalty is :math:`g_t`; when it ends,
    :math:`\Omega_i \leftarrow \Omega_i + \max(0, \omega_i) / ((\theta_i - \theta^*_i)^2 + \xi)`.

    Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017, equations 3 to 5;
    negative :math:`\omega` counts as 0, as in its code.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        penalty: c, at least 0.
        damping: :math:`\xi`, above 0.
        options: of `ContinualMethod`.

    Attributes:
        path: :math:`\omega`, up to the last step.
        last_gradient: g of the last step.
        last_place: parameters before the last step.
    """

    def __init__(
        self, backbone: nn.Module, head: Head, penalty: float = 1.0, damping: float = 0.1, **options: Any
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.penalty", penalty, at_least=0, below=math.inf)
        require("model.init_args.damping", damping, above=0, below=math.inf)
        self.penalty, self.damping = penalty, damping
        self.strength = 2 * penalty  # the gradient of its square
        self.path: TensorsOfParameters | None = None
        self.last_gradient: TensorsOfParameters | None = None
        self.last_place: TensorsOfParameters | None = None

    def make_parts(self) -> None:
        """Make the head, and what is kept of each parameter."""
        super().make_parts()
        trained = self.trained_parameters()
        self.path, self.last_gradient, self.last_place = (TensorsOfParameters(trained) for _ in range(3))

    @torch.no_grad()
    def on_task_start(self, task: int) -> None:
        """Measure the way from here; where an earlier task ended, the parameters are held already."""
        assert self.anchor is not None
        self.anchor.copy_from(self.trained_parameters())

    @torch.no_grad()
    def adjust_gradients(self) -> None:
        """Count the last step, note this one, and pull."""
        assert self.last_gradient is not None and self.last_place is not None
        self._count_last_step()
        for name, parameter in self.trained_parameters().items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            # what is not finite belongs to a step that is skipped
            self.last_gradient[name].copy_(gradient.nan_to_num(0.0, 0.0, 0.0))
        self.last_place.copy_from(self.trained_parameters())
        super().adjust_gradients()

    @torch.no_grad()
    def on_task_end(self, task: int) -> None:
        """Turn the task's way into importance."""
        assert self.path is not None and self.anchor is not None and self.last_gradient is not None
        self._count_last_step()
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained_parameters().items():
            moved = (parameter - self.anchor[name]).square()
            found[name] = self.path[name].clamp_min(0) / (moved + self.damping)
            self.path[name].zero_()
            self.last_gradient[name].zero_()
        self.consolidate(found)

    def _count_last_step(self) -> None:
        assert self.path is not None and self.last_gradient is not None and self.last_place is not None
        for name, parameter in self.trained_parameters().items():
            self.path[name].sub_(self.last_gradient[name] * (parameter - self.last_place[name]))
