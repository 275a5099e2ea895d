"""Layers, usable in plain PyTorch without Lightning."""

from mh_lightning.layers.class_covariances import ShrunkClassCovariances
from mh_lightning.layers.class_gaussians import ClassGaussians
from mh_lightning.layers.class_means import ClassMeans
from mh_lightning.layers.closed_form import ClosedFormHead
from mh_lightning.layers.linear_discriminant import StreamingLinearDiscriminant
from mh_lightning.layers.memory_head import MHLinear
from mh_lightning.layers.random_projection import RandomProjectionRidge
from mh_lightning.layers.ridge_memory import RidgeMemoryUnits
from mh_lightning.layers.stacks import MLP, StackedMemoryHeads
from mh_lightning.layers.task_heads import TaskHeads, TruncatedNormalLinear

__all__ = [
    "MLP",
    "ClassGaussians",
    "ClassMeans",
    "ClosedFormHead",
    "MHLinear",
    "RandomProjectionRidge",
    "RidgeMemoryUnits",
    "ShrunkClassCovariances",
    "StackedMemoryHeads",
    "StreamingLinearDiscriminant",
    "TaskHeads",
    "TruncatedNormalLinear",
]
