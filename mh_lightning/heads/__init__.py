"""Classifiers on features that stand where a layer does: solved from sums of a stream, without a gradient; and heads of
single tasks.
"""

from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.class_covariances import ShrunkClassCovariances
from mh_lightning.heads.class_gaussians import ClassGaussians
from mh_lightning.heads.class_means import ClassMeans
from mh_lightning.heads.feature_sums import RidgeRegression
from mh_lightning.heads.joint import JointKernelRidge, JointLogisticRegression
from mh_lightning.heads.kernel_memory import KernelMemoryUnits
from mh_lightning.heads.linear_discriminant import StreamingLinearDiscriminant
from mh_lightning.heads.random_features import RandomFeatureDiscriminant, RandomFeatureRidge
from mh_lightning.heads.random_projection import RandomProjectionRidge
from mh_lightning.heads.regularised_discriminant import RegularisedDiscriminant
from mh_lightning.heads.task_heads import TaskHeads, TruncatedNormalLinear
from mh_lightning.heads.truncated_projection import TruncatedProjection

__all__ = [
    "ClassGaussians",
    "ClassMeans",
    "ClosedFormHead",
    "JointKernelRidge",
    "JointLogisticRegression",
    "KernelMemoryUnits",
    "RandomFeatureDiscriminant",
    "RandomFeatureRidge",
    "RandomProjectionRidge",
    "RegularisedDiscriminant",
    "RidgeRegression",
    "ShrunkClassCovariances",
    "StreamingLinearDiscriminant",
    "TaskHeads",
    "TruncatedNormalLinear",
    "TruncatedProjection",
]
