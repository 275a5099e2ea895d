"""Mistakes that a user can make and mend."""

import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mh_lightning.files import as_a_whole


class UserError(ValueError):
    """A setting, file or data set that cannot be used.

    The message is one sentence that names the option, what it got and what would do. The command line prints it and
    exits with code 2; in Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str) -> None:
        # a data loader's worker wraps the sentence into its traceback
        super().__init__(message.rpartition("mh_lightning.errors.UserError: ")[2].strip())


def require(
    option: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Sequence[str] | None = None,
    or_text: str | None = None,
    whole: bool = False,
) -> None:
    """Refuse the value of an option that is out of range, NaN included; None, an option that is left out, is not.

    Args:
        option: that is named.
        value: what it got.
        at_least: the lowest that it takes.
        above: what it must pass.
        at_most: the highest that it takes.
        below: what it must not reach; infinity asks for a finite number.
        one_of: the texts that it takes.
        or_text: a text that it takes beside numbers.
        whole: whether it takes whole numbers alone.

    Raises:
        UserError: names the option, its range and what it got.

    Example:
        >>> require("data.batch_size", 4, at_least=1)
        >>> require("data.validation_fraction", 1.5, at_least=0, below=1)
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: data.validation_fraction must lie in [0, 1), got 1.5.
    """
    if value is None or (or_text is not None and value == or_text):
        return
    if one_of is not None:
        if value not in one_of:
            raise UserError(f"{option} must be one of {', '.join(one_of)}; got {value!r}.")
        return
    low = -math.inf if at_least is None and above is None else at_least if above is None else above
    high = math.inf if at_most is None and below is None else at_most if below is None else below
    assert low is not None and high is not None
    if whole and not isinstance(value, Integral):
        raise UserError(f"{option} must be a whole number, got {value!r}.")
    if not isinstance(value, str):
        above_low = value > low if above is not None else value >= low
        if above_low and (value < high if below is not None else value <= high):
            return
    if low == -high == -math.inf:
        bound = "be finite"
    elif high == math.inf:
        bound = f"be above {low}" if above is not None else f"be at least {low}"
        bound += "" if below is None else " and finite"
    elif low == -math.inf:
        bound = f"be below {high}" if below is not None else f"be at most {high}"
    else:
        shown = "2**32" if high == 2**32 else high
        bound = f"lie in {'(' if above is not None else '['}{low}, {shown}{')' if below is not None else ']'}"
    text = "" if or_text is None else f", or be {or_text!r}"
    raise UserError(f"{option} must {bound}{text}, got {value!r}.")


# what libraries raise on files that are damaged or hold something else
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    AttributeError,
    TypeError,
    LookupError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


# what torch says to a name of a device
NO_DEVICE = ("Invalid device string", "Expected one of cpu", "Torch not compiled with", "device type ")


def reason_of(error: BaseException) -> str:
    r"""The first sentence of an error's message, to be put into one's own.

    Example:
        >>> reason_of(ValueError("It is too long. Try less.\nSee above."))
        'It is too long'
        >>> reason_of(RuntimeError("can't allocate memory: you tried to allocate 8000000 bytes. Error code 12"))
        '8.0 MB at once'
    """
    asked = re.search("allocate memory: you tried to allocate ([0-9]+) bytes", str(error))
    if asked is not None:
        size, units = float(asked[1]), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
        while size >= 1000 and len(units) > 1:
            size, units = size / 1000, units[1:]
        return f"{size:.1f} {units[0]} at once"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".:")


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Name the option in front when the object that it describes cannot be made.

    Raises:
        UserError: in place of what the object's class raises on values that it does not take.

    Example:
        >>> with blame("model.init_args.head"):
        ...     raise TypeError("It takes two numbers.")
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: model.init_args.head: It takes two numbers.
    """
    try:
        yield
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{option}: {str(error).rstrip('.')}.") from error
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith(NO_DEVICE):
            raise UserError(f"{option}: {reason_of(error)}.") from error
        if not out_of_memory(error):
            raise
        raise UserError(f"{option} needs more memory than there is ({reason_of(error)}); make it smaller.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on any device."""
    words = ("allocate memory: you tried to allocate", "Storage size calculation overflowed", "multiplication overflow")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name a run's file if it cannot be written.

    Raises:
        UserError: in place of what the system says.

    Example:
        >>> with writing(Path("results.json")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: 'results.json' cannot be written (No space left on device); make room, or give \
another --run_dir.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be written ({error.strerror or reason_of(error)}); make room, or give another "
            "--run_dir."
        ) from error


def write_at_once(path: Path, text: str) -> None:
    """Write a run's file beside its place and move it there, so that no half-written one is ever found.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_a_whole(path) as partial:
            partial.write_bytes(text.encode())
