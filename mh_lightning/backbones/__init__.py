"""Backbones: modules that turn inputs into feature vectors, with the transforms that their inputs need."""

from mh_lightning.backbones.base import Backbone, Identity, ImageFormat, ParameterGroup
from mh_lightning.backbones.peft import Adapters, LoRA, Peft, ScaleAndShift, VisualPrompts
from mh_lightning.backbones.plain_modules import ModuleBackbone, as_backbone
from mh_lightning.backbones.timm_models import TimmBackbone

__all__ = [
    "Adapters",
    "Backbone",
    "Identity",
    "ImageFormat",
    "LoRA",
    "ModuleBackbone",
    "ParameterGroup",
    "Peft",
    "ScaleAndShift",
    "TimmBackbone",
    "VisualPrompts",
    "as_backbone",
]
