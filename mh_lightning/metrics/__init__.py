"""Continual metrics: classes here, the pure functions in `mh_lightning.metrics.functional`."""

from mh_lightning.metrics.continual import (
    AccuracyMatrix,
    AllPairsBackwardTransfer,
    AllPairsForwardTransfer,
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    IncrementalAccuracy,
    LastAccuracy,
    LastAccuracyNew,
    LastAccuracyOld,
    continual_metrics,
)

__all__ = [
    "AccuracyMatrix",
    "AllPairsBackwardTransfer",
    "AllPairsForwardTransfer",
    "AverageAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "IncrementalAccuracy",
    "LastAccuracy",
    "LastAccuracyNew",
    "LastAccuracyOld",
    "continual_metrics",
]
