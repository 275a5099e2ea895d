"""The heat map of an accuracy matrix."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mh_lightning.callbacks.plots import accuracy_matrix_figure

MATRIX = np.array([[0.91, 0.0, 0.126], [0.5, 1.0, 0.33], [0.25, 0.75, 0.6]])


def drawn(matrix: NDArray[np.float64]) -> tuple[np.ma.MaskedArray, dict[tuple[int, int], str]]:
    """The heat map's values, and the numbers by (row, column)."""
    (axes,) = accuracy_matrix_figure(matrix, "a title").axes
    (image,) = axes.images
    assert image.get_clim() == (0, 1)  # colours mean the same in every figure
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    return np.ma.masked_invalid(image.get_array()), numbers


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_one_cell_a_task(rows: int) -> None:
    values, numbers = drawn(MATRIX[:rows])
    assert values.shape == (3, 3)
    assert np.array_equal(values[:rows].filled(-1), MATRIX[:rows])
    assert values[rows:].mask.all()  # tasks still to come
    percent = [["91", "0", "13"], ["50", "100", "33"], ["25", "75", "60"]]
    assert numbers == {(row, column): percent[row][column] for row in range(rows) for column in range(3)}


def test_words() -> None:
    (axes,) = accuracy_matrix_figure(MATRIX, "test accuracy").axes
    assert axes.get_title() == "test accuracy"
    assert "on task" in axes.get_xlabel() and "after training task" in axes.get_ylabel()
    for ticks, labels in (
        (axes.get_xticks(), axes.get_xticklabels()),
        (axes.get_yticks(), axes.get_yticklabels()),
    ):
        assert list(ticks) == [0, 1, 2] and [label.get_text() for label in labels] == ["1", "2", "3"]


def test_spaced_rows_are_named_and_alone() -> None:
    (axes,) = accuracy_matrix_figure(np.random.default_rng(0).random((3, 5000)), "title", [2000, 4000, 5000]).axes
    (image,) = axes.images
    assert image.get_array().shape == (3, 5000)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2000", "4000", "5000"]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["1", "501"]


def test_numbers_can_be_read() -> None:
    (axes,) = accuracy_matrix_figure(MATRIX, "title").axes
    (image,) = axes.images
    for text in axes.texts:
        column, row = text.get_position()
        red, green, blue, _ = image.cmap(image.norm(MATRIX[row, column]))
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        assert (text.get_color() == "black") == (luminance > 0.5), f"{text.get_text()} on {luminance:.2f}"


@pytest.mark.parametrize("tasks", [1, 3, 20, 21, 100])
def test_saves_as_png(tasks: int, tmp_path: Path) -> None:
    figure = accuracy_matrix_figure(np.random.default_rng(0).random((tasks, tasks)), "title")
    assert len(figure.axes[0].texts) == (tasks**2 if tasks <= 20 else 0)
    assert len(figure.axes[0].get_xticks()) <= 20
    path = tmp_path / "matrix.png"
    figure.savefig(path, dpi=50)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and len(np.unique(np.array(image.convert("L")))) > 2
        assert max(image.size) <= 50 * 15
