"""Methods: LightningModules that learn a stream; `mh_lightning.methods.base` is what they share."""

from mh_lightning.methods.base import ContinualMethod
from mh_lightning.methods.fine_tuning import FineTuning
from mh_lightning.methods.nearest_class_mean import NearestClassMean

__all__ = ["ContinualMethod", "FineTuning", "NearestClassMean"]
