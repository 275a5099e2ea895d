"""The Memory Head as a layer, usable in plain PyTorch without Lightning."""

from mh_lightning.layers.memory_head import MHLinear
from mh_lightning.layers.stacks import MLP, StackedMemoryHeads

__all__ = ["MLP", "MHLinear", "StackedMemoryHeads"]
