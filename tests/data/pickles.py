"""Pickles as Python 2 wrote them, and such as run code."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def python_2_array(array: np.ndarray) -> bytes:
    """The part of a pickle that makes an array of bytes."""
    shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in array.shape) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ"
    dtype += b"\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    return made + b"(K\x01" + shape + dtype + b"I00\n" + text(array.tobytes()) + b"tb"


def python_2_value(value: Any) -> bytes:
    """The part of a pickle that makes a value."""
    if isinstance(value, np.ndarray):
        return python_2_array(value)
    if isinstance(value, dict):
        return b"}(" + b"".join(text(name.encode()) + python_2_value(entry) for name, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2_value, value)) + b"e"
    return text(value.encode()) if isinstance(value, str) else b"M" + struct.pack("<H", value)


def python_2_pickle(content: dict[str, Any]) -> bytes:
    """What Python 2's cPickle writes with protocol 2: byte strings, and NumPy's old module names."""
    return b"\x80\x02" + python_2_value(content) + b"."


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)
