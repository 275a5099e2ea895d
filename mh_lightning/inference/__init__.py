"""A trained model without its trainer and data: loaded, asked, exported."""

from mh_lightning.inference.export import export
from mh_lightning.inference.loading import load
from mh_lightning.inference.model import Model, Prediction

__all__ = ["Model", "Prediction", "export", "load"]
