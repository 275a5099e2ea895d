"""Continual learning with Memory Heads: a layer, `MHLinear`, and a toolkit around it, `fit` and `Trainer`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mh_lightning.inference import Model, load
    from mh_lightning.layers import MHLinear
    from mh_lightning.optimizer import memory_head_optimizer
    from mh_lightning.results import Results
    from mh_lightning.trainer import Trainer, fit

__version__ = version("mh_lightning")
__all__ = ["MHLinear", "Model", "Results", "Trainer", "__version__", "fit", "load", "memory_head_optimizer"]

# all is imported when it is asked for, since torch and Lightning take seconds
PLACES = {
    "MHLinear": "layers",
    "Model": "inference",
    "Results": "results",
    "Trainer": "trainer",
    "fit": "trainer",
    "load": "inference",
    "memory_head_optimizer": "optimizer",
}
PACKAGES = (
    "backbones",
    "callbacks",
    "data",
    "experiments",
    "functional",
    "heads",
    "inference",
    "layers",
    "methods",
    "metrics",
)


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return import_module(f"mh_lightning.{name}")
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mh_lightning.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES, *PACKAGES])
