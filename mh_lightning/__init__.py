"""Continual learning with Memory Heads."""

from mh_lightning.layers import MHLinear
from mh_lightning.optimizer import memory_head_optimizer

__all__ = ["MHLinear", "memory_head_optimizer"]
