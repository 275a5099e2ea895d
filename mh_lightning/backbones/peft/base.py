"""What all kinds of parameter-efficient fine-tuning have in common."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class Peft(ABC):
    """Parameters that are added to a model, whose own ones are frozen. At first they change none of its answers, but
    for prompts.

    Attributes:
        merges: whether they can become a part of the model's own.
    """

    merges: ClassVar[bool] = False

    @abstractmethod
    def add_to(self, model: nn.Module) -> None:
        """Add trainable parameters to a timm model, in place.

        Raises:
            UserError: if the model has nothing that they can be added to.
        """

    def arguments(self) -> dict[str, Any]:
        """Class and options in plain values."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": asdict(self)}


def merge(model: nn.Module) -> None:
    """Make what is added to weights and biases a part of them, so that it costs nothing any more. What stands beside
    them, as adapters and prompts do, stays.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", nn.Dropout(0.0))
        >>> merge(layer)
        >>> sorted(dict(layer.named_parameters()))
        ['bias', 'weight']
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        # parametrize.remove_parametrizations takes attributes from a class that copies of the module share
        del module.parametrizations
        module.__class__ = parametrize.type_before_parametrizations(module)
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
