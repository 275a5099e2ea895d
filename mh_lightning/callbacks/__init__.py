"""Callbacks: what happens around the training of a method on a stream."""

from mh_lightning.callbacks.checkpoints import AtomicCheckpointIO, TaskCheckpoints
from mh_lightning.callbacks.continual_metrics import ContinualMetrics
from mh_lightning.callbacks.cost import CostMonitor
from mh_lightning.callbacks.earlier_tasks import EarlierTasks
from mh_lightning.callbacks.hyper_parameters import HyperParameters
from mh_lightning.callbacks.memory_heads import MemoryHeadMonitor
from mh_lightning.callbacks.online_accuracy import OnlineAccuracy
from mh_lightning.callbacks.predictions import PredictionWriter
from mh_lightning.callbacks.rank_consistency import RankConsistency
from mh_lightning.callbacks.stream_pictures import DecisionSurfaces, StreamPreview
from mh_lightning.callbacks.tasks import TaskBoundaries, TaskProgressBar

__all__ = [
    "AtomicCheckpointIO",
    "ContinualMetrics",
    "CostMonitor",
    "DecisionSurfaces",
    "EarlierTasks",
    "HyperParameters",
    "MemoryHeadMonitor",
    "OnlineAccuracy",
    "PredictionWriter",
    "RankConsistency",
    "StreamPreview",
    "TaskBoundaries",
    "TaskCheckpoints",
    "TaskProgressBar",
]
