"""Mistakes that a user can make and mend."""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
