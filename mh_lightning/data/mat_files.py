"""Tables in MATLAB files, as several data sets publish their annotations."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from mh_lightning.data.archived_images import reading


def read_mat_table(path: Path, name: str) -> NDArray[Any]:
    """A variable of a MATLAB file as an array of one dimension: of the rows of a table, or of texts.

    Raises:
        UserError: if the file is damaged, or has no such variable.
    """
    with reading(path):
        try:
            content = loadmat(path, squeeze_me=True)
        except MatReadError as error:
            raise ValueError(str(error)) from error
        if name not in content:
            raise ValueError(f"it holds no {name}")
        return np.atleast_1d(content[name])


def rows_of(path: Path, name: str, *columns: str) -> list[tuple[Any, ...]]:
    """Some columns of a table in a MATLAB file.

    Raises:
        UserError: if the file is damaged, or has no such table or column.
    """
    table = read_mat_table(path, name)
    with reading(path):
        return [tuple(row[column] for column in columns) for row in table]
