"""Continual metrics: classes and the table of all here, the pure functions in `mh_lightning.metrics.functional`."""

from mh_lightning.metrics.calibration import CALIBRATION, Calibration
from mh_lightning.metrics.continual import METRICS, AccuracyMatrix, ContinualMetric, Evaluations, continual_metrics
from mh_lightning.metrics.task_incremental import TaskIncrementalAccuracy

__all__ = [
    "CALIBRATION",
    "METRICS",
    "AccuracyMatrix",
    "Calibration",
    "ContinualMetric",
    "Evaluations",
    "TaskIncrementalAccuracy",
    "continual_metrics",
]
