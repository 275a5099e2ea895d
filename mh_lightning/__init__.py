"""Continual learning with Memory Heads."""

from mh_lightning.layers import MHLinear

__all__ = ["MHLinear"]
