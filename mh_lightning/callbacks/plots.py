"""Figures of a run."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray


def accuracy_matrix_figure(matrix: NDArray[np.float64], title: str) -> Figure:
    """Heat map of an accuracy matrix: a row for each task trained, a column for each task tested.

    Args:
        matrix: (rows, tasks), fractions in [0, 1].
        title: of the figure.
    """
    figure = Figure(
        figsize=(1.6 + 0.62 * min(matrix.shape[1], 20), 1.5 + 0.52 * min(matrix.shape[1], 20)), layout="constrained"
    )
    axes = figure.subplots()
    draw_accuracy_matrix(axes, matrix, title)
    return figure


def draw_accuracy_matrix(axes: Axes, matrix: NDArray[np.float64], title: str) -> None:
    """The heat map on given axes.

    Args:
        axes: where to draw.
        matrix: (rows, tasks), fractions in [0, 1]; missing rows stay empty.
        title: of the axes.
    """
    rows, tasks = matrix.shape
    full = np.full((max(rows, tasks), tasks), np.nan)
    full[:rows] = matrix
    axes.imshow(full, vmin=0, vmax=1, cmap="viridis")
    if tasks <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="black" if value > 0.6 else "white",
            )
    for set_ticks, count in ((axes.set_xticks, tasks), (axes.set_yticks, len(full))):
        ticks = np.arange(0, count, max(1, count // 10))
        set_ticks(ticks, ticks + 1)
    axes.set_xlabel("accuracy on task (%)")
    axes.set_ylabel("after training task")
    axes.set_title(title)
