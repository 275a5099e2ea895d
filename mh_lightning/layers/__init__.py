"""Layers, usable in plain PyTorch without Lightning."""

from mh_lightning.layers.memory_head import MHLinear

__all__ = ["MHLinear"]
