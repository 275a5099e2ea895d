"""Features of images, computed once and kept: ``python -m mh_lightning.data.features`` looks after them."""

from mh_lightning.data.features.cache import FeatureCache

__all__ = ["FeatureCache"]
