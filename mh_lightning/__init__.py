"""Continual learning with Memory Heads: a layer, `MHLinear`, and a toolkit around it, `fit` and `Trainer`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mh_lightning.layers import MHLinear
from mh_lightning.optimizer import memory_head_optimizer

if TYPE_CHECKING:
    from mh_lightning.results import Results
    from mh_lightning.trainer import Trainer, fit

__version__ = version("mh_lightning")
__all__ = ["MHLinear", "Results", "Trainer", "__version__", "fit", "memory_head_optimizer"]

# imported when they are asked for, since Lightning takes seconds that the layer does not need
LAZY = {"Results": "mh_lightning.results", "Trainer": "mh_lightning.trainer", "fit": "mh_lightning.trainer"}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
