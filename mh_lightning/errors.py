"""Mistakes that a user can make and mend."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


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


def reason_of(error: Exception) -> str:
    r"""The first sentence of an error's message, to be put into one's own.

    Example:
        >>> reason_of(ValueError("It is too long. Try less.\nSee above."))
        'It is too long'
    """
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
