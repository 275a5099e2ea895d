"""Pickles of NumPy arrays and plain containers, read without calling anything that they name."""

import io
import operator
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Dtype:
    """In place of numpy.dtype: types of numbers only."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch("[biuf][1248]", name):
            raise pickle.UnpicklingError(f"an array of type {name!r}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """In place of numpy.ndarray: empty when it is made, and filled by its state."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Dtype):
            raise pickle.UnpicklingError("an array of no type")
        raw = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote bytes as text
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _Buffer(_Array):
    """An array as protocol 5 keeps it."""

    def __init__(self, content: bytes, kind: _Dtype, shape: tuple[int, ...], order: str) -> None:
        self.__setstate__((1, shape, kind, order == "F", content))


class _Scalar(_Array):
    """A single number."""

    def __init__(self, kind: _Dtype, content: bytes) -> None:
        self.__setstate__((1, (), kind, False, content))

    def __index__(self) -> int:
        return operator.index(self.array[()])


# none of these can be changed by what a pickle sets: it is their __setstate__ that gets it, or they are built in
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): str.encode,  # bytes in protocols up to 2
    **{
        (f"numpy.{core}.{module}", name): kind
        for core in ("core", "_core")
        for module, name, kind in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _Buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not run")
        return ALLOWED[module_name, global_name]


def read_array_pickle(source: Path | bytes) -> Any:
    """The content of a pickle of Python 2 or 3, in a file or in memory; `as_array` gives the arrays in it.

    Raises:
        pickle.UnpicklingError: if the file names anything that arrays of numbers and plain containers do not need. On
            a damaged file pickle raises almost anything.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return _Unpickler(file, encoding="latin1").load()


def as_array(value: Any) -> NDArray[Any]:
    """An array that `read_array_pickle` has read, or a list of integers as one.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(value, list):
        return np.array([operator.index(number) for number in value], dtype=np.int64)
    if not isinstance(value, _Array):
        raise TypeError("no array where one belongs")
    return value.array
