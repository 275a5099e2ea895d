"""What a fit found: the content of its results.json, with its tables."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mh_lightning.callbacks.continual_metrics import RESULTS
from mh_lightning.callbacks.reports import results_table


class Results(Mapping[str, Any]):
    """What a fit found, read like a dictionary; its text is the table that a run ends with.

    Args:
        values: the content of ``results.json``; empty after a trial, which leaves no files.
        folder: the run folder, with pictures, logs and checkpoints.

    Example:
        >>> results = Results({"accuracy_matrix": [[1.0, 0.0], [0.5, 0.9]], "average_accuracy": 0.7}, Path("runs"))
        >>> results["average_accuracy"], results.accuracy_matrix.shape
        (0.7, (2, 2))
    """

    def __init__(self, values: Mapping[str, Any], folder: Path) -> None:
        self._values, self.folder = dict(values), folder

    @classmethod
    def of_folder(cls, folder: str | Path) -> "Results":
        """Those of a run folder, none if its fit left none."""
        path = Path(folder) / RESULTS
        return cls(json.loads(path.read_text()) if path.exists() else {}, Path(folder))

    @property
    def accuracy_matrix(self) -> NDArray[np.float64]:
        """(evaluations, tasks) accuracies in [0, 1] on test data."""
        return np.array(self._values["accuracy_matrix"])

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __str__(self) -> str:
        return results_table(self._values).strip("\n") if self._values else "no results"

    def __repr__(self) -> str:
        return f"Results of {self.folder}:\n{self}"
