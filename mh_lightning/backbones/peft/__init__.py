"""Parameter-efficient fine-tuning: a few trained parameters beside the frozen ones of a backbone."""

from mh_lightning.backbones.peft.adapters import Adapters
from mh_lightning.backbones.peft.base import Peft
from mh_lightning.backbones.peft.low_rank import LoRA
from mh_lightning.backbones.peft.prompts import VisualPrompts
from mh_lightning.backbones.peft.scale_and_shift import ScaleAndShift

__all__ = ["Adapters", "LoRA", "Peft", "ScaleAndShift", "VisualPrompts"]
