"""Heads of several layers: perceptrons, and stacks of Memory Heads."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning import functional
from mh_lightning.errors import UserError
from mh_lightning.layers.memory_head import MHLinear, fill_with_random_memories


class MLP(nn.Sequential):
    """Multi-layer perceptron with tanh between its layers.

    Args:
        in_features: n.
        out_features: o.
        hidden_features: width of each hidden layer.
        output_layer: makes the last layer from its numbers of inputs and outputs, e.g. `MHLinear`.

    Raises:
        UserError: without a hidden layer.

    Example:
        >>> MLP(2, 4, hidden_features=[25])(torch.ones(8, 2)).shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (25,),
        output_layer: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        widths = _widths(type(self).__name__, in_features, hidden_features)
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.Tanh()]
        super().__init__(*layers, output_layer(widths[-1], out_features))


class StackedMemoryHeads(nn.Module):
    """Memory Heads one after the other, with tanh between them.

    By default each layer matches its own input with its own keys. With `key_input`, each matches the input of the whole
    stack. With `route_by_winners`, only the first layer has keys: the units that it selects, and how much each of them
    weighs, decide in all layers, and a unit that is recycled is recycled in all layers.

    Args:
        in_features: n.
        out_features: o.
        hidden_features: width of each hidden layer.
        key_input: match the stack's input in every layer.
        route_by_winners: route by the first layer's winning units; excludes `key_input`.
        memory_head_options: of `MHLinear`, for all layers.

    Raises:
        UserError: on contradictory options.

    Example:
        >>> stack = StackedMemoryHeads(2, 4, hidden_features=[8], key_input=True, key_mem_units=5, delta=2)
        >>> stack(torch.ones(3, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (10,),
        key_input: bool = False,
        route_by_winners: bool = False,
        **memory_head_options: Any,
    ) -> None:
        super().__init__()
        if key_input and route_by_winners:
            raise UserError("StackedMemoryHeads: key_input and route_by_winners exclude each other; give one.")
        widths = [*_widths(type(self).__name__, in_features, hidden_features), out_features]
        self.key_input = key_input
        self.first = MHLinear(widths[0], widths[1], **memory_head_options)
        if route_by_winners and (not self.first.shared_keys or self.first.layer_norm):
            raise UserError("StackedMemoryHeads: route_by_winners needs shared_keys=True and layer_norm=False.")
        later: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths[1:]):
            if route_by_winners:
                later.append(RoutedLinear(width, next_width, self.first))
            else:
                key_features = in_features if key_input else None
                later.append(MHLinear(width, next_width, key_features=key_features, **memory_head_options))
        self.later = nn.ModuleList(later)

    def forward(self, x: Tensor) -> Tensor:
        """Map (*, n) to (*, o)."""
        *batch_shape, _ = x.shape
        x = x.reshape(-1, x.shape[-1])
        y, attention = self.first.forward_with_attention(x)
        for layer in self.later:
            hidden = torch.tanh(y)
            if isinstance(layer, RoutedLinear):
                y = layer(hidden, attention)
            else:
                y = layer(hidden, x if self.key_input else None)
        if self.first.followers and self.training and y.requires_grad:
            self.first.refuse_passes_after_recycling(y)
        return y.view(*batch_shape, y.shape[-1]) if len(batch_shape) > 1 else y


class RoutedLinear(nn.Module):
    """A linear layer blended from memory units that another layer's keys address.

    Args:
        in_features: n.
        out_features: o.
        router: the Memory Head that selects units; units that it recycles are recycled here too.
    """

    def __init__(self, in_features: int, out_features: int, router: MHLinear) -> None:
        super().__init__()
        self.bias, self.winner_only = router.bias, router.upd_m == "WTA"
        memories = torch.empty(1, router.key_mem_units, out_features * (in_features + self.bias))
        self.M = nn.Parameter(fill_with_random_memories(memories))
        router.followers.append(self)

    def forward(self, x: Tensor, attention: functional.Attention) -> Tensor:
        """Map (b, n) to (b, o), by the router's attention."""
        return functional.blend(x, self.M, attention, bias=self.bias, winner_only=self.winner_only)


def _widths(name: str, in_features: int, hidden_features: Sequence[int]) -> list[int]:
    if not hidden_features or min(hidden_features) < 1:
        raise UserError(f"{name}: hidden_features must hold a positive width a hidden layer, got {hidden_features}.")
    return [in_features, *hidden_features]
