"""What methods share that hold each parameter near its place after the last task, by its importance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError
from mh_lightning.methods.base import ContinualMethod, Head


class TensorsOfParameters(nn.Module):
    """A tensor for each of some parameters, in checkpoints; zeros at first.

    Args:
        parameters: by name.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> TensorsOfParameters(dict(layer.named_parameters()))["weight"].shape
        torch.Size([3, 2])
    """

    same_on_all_ranks = True  # see `mh_lightning.distributed.state_kept_alike`

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_buffer(_key(name), torch.zeros_like(parameter))

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(_key(name))

    def copy_from(self, values: Mapping[str, Tensor]) -> None:
        """Take the values of tensors by their names."""
        for name, value in values.items():
            self[name].copy_(value)

    def grow(self, parameters: Mapping[str, Tensor]) -> None:
        """Zeros for what parameters have more of than before, in their first dimension.

        Raises:
            UserError: if they have become larger in another way.
        """
        for name, parameter in parameters.items():
            before = self[name]
            if before.shape == parameter.shape:
                continue
            if before.shape[1:] != parameter.shape[1:]:
                raise UserError(
                    f"model: {name} has grown from {tuple(before.shape)} to {tuple(parameter.shape)}, and which of its "
                    "numbers are new is not known to a penalty on parameters; go on with the classes that were learnt, "
                    "or with torch.nn.Linear as the head."
                )
            larger = torch.zeros_like(parameter)
            larger[: len(before)] = before
            self.register_buffer(_key(name), larger)


class QuadraticPenaltyMethod(ContinualMethod):
    r"""A method whose steps are also pulled back, by the gradient of
    :math:`\frac{\lambda}{2} \sum_i \Omega_i (\theta_i - \theta^*_i)^2`, to where the parameters were after the last
    task. Subclasses add to the importance when a task ends.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        options: of `ContinualMethod`.

    Attributes:
        importance: :math:`\Omega`, of each trained parameter.
        anchor: :math:`\theta^*`.
        strength: :math:`\lambda`.
    """

    strength: float

    def __init__(self, backbone: nn.Module, head: Head, **options: Any) -> None:
        super().__init__(backbone, head, **options)
        self.importance: TensorsOfParameters | None = None
        self.anchor: TensorsOfParameters | None = None

    def make_parts(self) -> None:
        """Make the head, and what is kept of each parameter."""
        super().make_parts()
        trained = self.trained_parameters()
        self.importance, self.anchor = TensorsOfParameters(trained), TensorsOfParameters(trained)

    def grow_parts(self) -> None:
        """Nothing is known yet of the parameters of new classes."""
        super().grow_parts()
        trained = self.trained_parameters()
        for part in self.children():
            if isinstance(part, TensorsOfParameters):
                part.grow(trained)

    def consolidate(self, importance: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Hold the parameters where they are now.

        Args:
            importance: what is added to that of each parameter.
            decay: what is left of the earlier importance.
        """
        assert self.importance is not None and self.anchor is not None
        for name, value in importance.items():
            self.importance[name].mul_(decay).add_(value)
        self.anchor.copy_from({name: one.detach() for name, one in self.trained_parameters().items()})

    @torch.no_grad()
    def adjust_gradients(self) -> None:
        """Add the gradient of the penalty, from the second task on."""
        if self.stream.num_earlier_tasks + self.task == 0:
            return
        assert self.importance is not None and self.anchor is not None
        for name, parameter in self.trained_parameters().items():
            pull = self.strength * self.importance[name] * (parameter - self.anchor[name])
            parameter.grad = pull if parameter.grad is None else parameter.grad.to_dense() + pull


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dot
