"""The maths of the Memory Head as pure functions: matching, attention, blending and the updates of the keys.

Symbols, here and in `mh_lightning.layers`: b samples, n input features, q key sets, m memory units a set, d key size,
p outputs a key set (all of them with shared keys, 1 with private ones), k units selected for a sample.

Source: Tiezzi, Becattini, Marullo, Melacci, "Memory Head for Pre-Trained Backbones in Continual Learning",
CoLLAs 2024, section 3.
"""

from mh_lightning.compat.torch_names import in_function_transform
from mh_lightning.functional.attention import EPSILON, Attention, attend, match, spread, unit_length
from mh_lightning.functional.blending import blend, blend_vectors
from mh_lightning.functional.key_updates import ScramblePlan, are_usable, move_keys_, plan_scramble, usable_rows
from mh_lightning.functional.one_sample import (
    Floats,
    OneAttention,
    attend_one,
    blend_one,
    is_finite,
    is_one_sample,
    is_usable,
    move_key_,
    unit_to_scramble,
)

__all__ = [
    "EPSILON",
    "Attention",
    "Floats",
    "OneAttention",
    "ScramblePlan",
    "are_usable",
    "attend",
    "attend_one",
    "blend",
    "blend_one",
    "blend_vectors",
    "in_function_transform",
    "is_finite",
    "is_one_sample",
    "is_usable",
    "match",
    "move_key_",
    "move_keys_",
    "plan_scramble",
    "spread",
    "unit_length",
    "unit_to_scramble",
    "usable_rows",
]
