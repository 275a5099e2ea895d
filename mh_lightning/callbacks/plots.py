"""Figures of a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

MOST_POINTS = 2000  # of a scatter plot, for each class
MOST_STEPS = 20_000  # of a curve
MOST_BOUNDARIES = 200  # of tasks


def accuracy_matrix_figure(
    matrix: NDArray[np.float64], title: str, evaluated_after: Sequence[int] | None = None
) -> Figure:
    """Heat map of an accuracy matrix: a row for each evaluation, a column for each task tested.

    Args:
        matrix: (rows, tasks), fractions in [0, 1].
        title: of the figure.
        evaluated_after: numbers of tasks trained at the rows, by default 1, 2 and so on.
    """
    figure = Figure(
        figsize=(1.6 + 0.62 * min(matrix.shape[1], 20), 1.5 + 0.52 * min(matrix.shape[1], 20)), layout="constrained"
    )
    axes = figure.subplots()
    draw_accuracy_matrix(axes, matrix, title, evaluated_after)
    return figure


def draw_accuracy_matrix(
    axes: Axes, matrix: NDArray[np.float64], title: str, evaluated_after: Sequence[int] | None = None
) -> None:
    """The heat map on given axes.

    Args:
        axes: where to draw.
        matrix: (rows, tasks), fractions in [0, 1]; missing rows stay empty, where there is one after each task.
        title: of the axes.
        evaluated_after: numbers of tasks trained at the rows, by default 1, 2 and so on.
    """
    rows, tasks = matrix.shape
    trained = list(range(1, rows + 1)) if evaluated_after is None else list(evaluated_after)
    spaced = trained != list(range(1, rows + 1))
    full = matrix
    if not spaced:
        full = np.full((max(rows, tasks), tasks), np.nan)
        full[:rows] = matrix
        trained = list(range(1, len(full) + 1))
    axes.imshow(full, vmin=0, vmax=1, cmap="viridis", aspect="auto" if spaced else None)
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
    for set_ticks, numbers in ((axes.set_xticks, np.arange(1, tasks + 1)), (axes.set_yticks, np.array(trained))):
        ticks = np.arange(0, len(numbers), max(1, len(numbers) // 10))
        set_ticks(ticks, numbers[ticks])
    axes.set_xlabel("accuracy on task (%)")
    axes.set_ylabel("after training task")
    axes.set_title(title)


def online_accuracy_figure(correct: NDArray[np.uint8], task_starts: list[int]) -> Figure:
    """Running accuracy over the stream, with the tasks' boundaries unless there are too many to see.

    Args:
        correct: of each sample in the stream's order, 0 or 1, (samples,).
        task_starts: the first sample of each task.
    """
    window = max(1, min(len(correct), max(20, len(correct) // 50)))
    sums = np.cumsum(np.concatenate([[0], correct]), dtype=np.int64)
    running = (sums[window:] - sums[:-window]) / window
    shown = np.unique(np.linspace(0, len(running) - 1, MOST_STEPS).astype(np.int64))
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(shown + window, 100 * running[shown], linewidth=1.2)
    for task, start in enumerate(task_starts if len(task_starts) <= MOST_BOUNDARIES else []):
        axes.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        if len(task_starts) <= 20:
            axes.annotate(f"{task + 1}", (start, 1.01), xycoords=("data", "axes fraction"), va="bottom", color="0.5")
    axes.set(
        xlim=(0, len(correct)),
        ylim=(0, 102),
        xlabel="training samples",
        ylabel=f"accuracy of the last {window} (%)",
    )
    axes.set_title(f"accuracy before learning: {100 * correct.mean():.1f} % over the stream; numbers are tasks", pad=18)
    return figure


@dataclass
class Plane:
    """How a plane is divided among classes at some time."""

    classes: NDArray[np.int64]  # (rows, columns), from bottom to top
    extent: tuple[float, float, float, float]  # left, right, bottom, top
    samples: NDArray[np.float32]  # (samples, 2)
    labels: NDArray[np.int64]  # (samples,)
    keys: NDArray[np.float32]  # (keys, 2)
    title: str

    def as_plain(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        plain = asdict(self) | {"classes": self.classes.astype(np.int16)}
        return {
            name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            for name, value in plain.items()
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Plane":
        """From a checkpoint."""
        arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
        return cls(**arrays | {"classes": arrays["classes"].astype(np.int64), "extent": tuple(arrays["extent"])})


def _class_colours(count: int) -> NDArray[np.float64]:
    """(count, 3), in [0, 1]; they repeat after 20."""
    palette = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    return np.array([palette(label % palette.N)[:3] for label in range(count)])


def decision_surface_image(plane: Plane, scale: int = 3) -> NDArray[np.uint8]:
    """A plain picture, without axes, that costs milliseconds: classes as pale areas, samples as dots, keys as crosses.

    Args:
        plane: what to draw.
        scale: pixels a point of its grid.

    Returns:
        (height, width, 3).
    """
    colours = _class_colours(int(max(plane.classes.max(), plane.labels.max(initial=0))) + 1)
    image = np.kron(1 - 0.35 * (1 - colours[plane.classes[::-1]]), np.ones((scale, scale, 1)))
    height, width = image.shape[:2]
    left, right, bottom, top = plane.extent

    def place(points: NDArray[np.float32], margin: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        columns = (points[:, 0] - left) / (right - left) * (width - 1)
        rows = (top - points[:, 1]) / (top - bottom) * (height - 1)
        return (
            np.clip(rows.round(), margin, height - 1 - margin).astype(np.int64),
            np.clip(columns.round(), margin, width - 1 - margin).astype(np.int64),
        )

    rows, columns = place(plane.samples, 1)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        image[rows + row, columns + column] = 0.85 * colours[plane.labels]
    inside = np.all((plane.keys >= [left, bottom]) & (plane.keys <= [right, top]), axis=1)
    rows, columns = place(plane.keys[inside], 6)
    for step in range(-6, 7):
        for thick in (0, 1):
            image[rows + step, columns + thick] = image[rows + thick, columns + step] = 0
    return (255 * image).astype(np.uint8)


def decision_surfaces_figure(planes: list[Plane], class_names: list[str]) -> Figure:
    """One panel for each task.

    Args:
        planes: after each task.
        class_names: of all classes.
    """
    columns = min(4, len(planes))
    rows = -(-len(planes) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.2, 3.3 * rows + 0.5), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for axes in all_axes.flat[len(planes) :]:
        axes.set_axis_off()
    for axes, plane in zip(all_axes.flat, planes, strict=False):
        draw_decision_surface(axes, plane, class_names)
    handles, labels = all_axes.flat[len(planes) - 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), markerscale=2)
    return figure


def draw_decision_surface(axes: Axes, plane: Plane, class_names: list[str]) -> None:
    """Classes as pale areas, samples as dots, keys as crosses.

    Args:
        axes: where to draw.
        plane: what to draw.
        class_names: of all classes.
    """
    colours = _class_colours(len(class_names))
    axes.imshow(1 - 0.35 * (1 - colours[plane.classes]), origin="lower", extent=plane.extent, aspect="auto")
    for label, name in enumerate(class_names):
        points = plane.samples[plane.labels == label][:MOST_POINTS]
        axes.scatter(points[:, 0], points[:, 1], s=3, color=0.85 * colours[label], label=f"class {name}", linewidths=0)
    if len(plane.keys):
        axes.scatter(plane.keys[:, 0], plane.keys[:, 1], s=25, color="black", marker="x", linewidths=1.3, label="keys")
    left, right, bottom, top = plane.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axes.set_title(plane.title, fontsize=9)


def preview_figure(
    pictures: list[tuple[NDArray[Any], NDArray[np.int64]]], task_names: list[str], class_names: list[str]
) -> Figure | None:
    """Samples of each task, or None if they cannot be drawn.

    Args:
        pictures: for each task its samples, images (s, height, width, 3) of type uint8 or points (s, 2), and their
            classes (s,).
        task_names: of the same tasks.
        class_names: of all classes.
    """
    samples = pictures[0][0]
    if samples.ndim == 2 and samples.shape[1] == 2:
        columns = min(4, len(pictures))
        rows = -(-len(pictures) // columns)
        figure = Figure(figsize=(2.6 * columns + 0.2, 2.6 * rows + 0.6), layout="constrained")
        all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        colours = _class_colours(len(class_names))
        for axes in all_axes.flat[len(pictures) :]:
            axes.set_axis_off()
        for axes, (points, labels), name in zip(all_axes.flat, pictures, task_names, strict=False):
            axes.scatter(*points[:MOST_POINTS].T, s=4, c=colours[labels[:MOST_POINTS]], linewidths=0)
            axes.set_title(name, fontsize=9)
        return figure
    if samples.dtype != np.uint8:
        return None
    most = max(len(part) for part, _ in pictures)
    figure = Figure(figsize=(1.1 * most + 1.6, 1.15 * len(pictures) + 0.3), layout="constrained")
    grid = figure.subplots(len(pictures), most, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for row, (images, _), name in zip(grid, pictures, task_names, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axes, image in zip(row, images, strict=False):
            axes.imshow(image)
    return figure
