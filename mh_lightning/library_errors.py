"""Which errors are the user's to mend, and how the command line says them in one sentence."""

import os
import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError
from torch.multiprocessing.spawn import ProcessRaisedException

from mh_lightning.errors import UserError, out_of_memory, reason_of
from mh_lightning.suggestions import with_suggestion

OF_THE_OTHER_FILE = {
    "backbone": "give a stream, such as --config streams/digits.yaml, or --model.backbone",
    "head": "give a method, such as --config methods/ncm.yaml, or --model.head",
}
# the frame that jsonargparse puts around the reason why it refuses a value
PARSER_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "Not a valid subclass of",
)
RESTORES = "lightning.pytorch.trainer.connectors.checkpoint_connector"
EARLY_STOPPING = "lightning.pytorch.callbacks.early_stopping"


def sentence_of(error: BaseException) -> str | None:
    """What the user did wrong, or what their machine lacks, or None if the error is not of their making.

    Example:
        >>> sentence_of(FileNotFoundError(2, "No such file or directory", "/nowhere"))
        "'/nowhere' cannot be read or written (No such file or directory)."
        >>> sentence_of(KeyError("a bug"))
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ProcessRaisedException) and UserError.__qualname__ in str(error):
        return str(UserError(str(error)))  # of a process that was spawned, whose traceback ends with it
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return f"A file is no text in UTF-8 ({error}); give YAML files."
    if isinstance(error, ArgumentError):
        return _parser_sentence(str(error))
    if out_of_memory(error):
        return (
            f"The run needs more memory than there is ({reason_of(error)}); make the model, the batches or the data "
            "smaller."
        )
    if isinstance(error, DistError):
        place = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', 'any port')}"
        return (
            f"The processes cannot meet at {place} ({reason_of(error)}); give another address and port in the "
            "environment variables MASTER_ADDR and MASTER_PORT."
        )
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in str(error):
        return (
            "data.batch_size: a batch holds one sample, from which batch normalisation cannot learn; give another, "
            "or backbone.frozen_batch_norm=true."
        )
    if isinstance(error, OSError) and error.strerror:
        names = " and ".join(repr(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None)
        return f"{names or 'A file'} cannot be read or written ({error.strerror})."
    return _sentence_by_place(error)


def _sentence_by_place(error: BaseException) -> str | None:
    """For errors of Lightning's that tell only by where they come from whose they are."""
    reason = " ".join(reason_of(error).split())
    if any(name.startswith(("restore", "resume", "_restore")) for name in _functions_of(error, RESTORES)):
        return (
            f"ckpt_path: the checkpoint cannot be restored ({type(error).__name__}: {reason}); it is damaged, or was "
            "not written by a fit of mh_lightning."
        )
    if isinstance(error, RuntimeError) and any(_functions_of(error, EARLY_STOPPING)):
        return f"trainer.callbacks: {reason}."
    return None


def _one_of(types: list[str], message: str) -> str:
    r"""What types the innermost option of a report takes, and what it got.

    Example:
        >>> lines = ["Expected a <class 'int'>", "Expected a <class 'list'>"]
        >>> _one_of(lines, "\n".join([*lines, "Given value: two"]))
        "Expected int or list, got 'two'"
    """
    inner = message.rpartition('Parser key "')[2]
    lines = [line.removeprefix("Expected a ").partition(". Got value")[0] for line in types if line in inner]
    names = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", line).replace("NoneType", "null") for line in lines]
    names = [*dict.fromkeys(names)]
    given = re.search(r"Given value: (.*)", inner)
    return f"Expected {' or '.join(names)}" + (f", got {given[1]!r}" if given else "")


def _functions_of(error: BaseException, module: str) -> Iterator[str]:
    """The names of a module's functions that an error passed through."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == module:
            yield frame.f_code.co_name


def _parser_sentence(message: str) -> str:
    r"""The one informative line of jsonargparse's report, with the option in front.

    Example:
        >>> _parser_sentence('Parser key "data":\n  Errors:\n    - Option \'x\' is not accepted\n  Given value: 1')
        "--data: Option 'x' is not accepted (see --help)."
    """
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [line.strip().removeprefix("- ") for line in re.sub(r'Parser key "[^"]+":', "", message).splitlines()]
    told = [line for line in lines if line and not line.startswith(PARSER_NOISE)]
    types = [line for line in told if line.startswith("Expected a") and "import path" not in line]
    told = (
        [_one_of(types, message)]
        if len(types) > 1
        else types or told or [line for line in lines if line.startswith("Not a valid")] or [" ".join(lines)]
    )
    if message.startswith("Unexpected config"):
        return "--config: a file holds no options by name; give YAML such as configs/quickstart.yaml."
    if not option:  # no value is refused, but the whole line or file
        told = [" ".join(message.split())]
    reason = told[-1].rpartition("callable class: ")[2].partition(" Got value: Namespace(")[0].strip().rstrip(".")
    reason = reason.partition(". Add the import path")[0]
    reason = re.sub("^Expected a dot import path string: *(.*)", r"'\1' is no class that is known here", reason)
    if "arguments are required: fit.data" in reason:
        return "nothing to learn; give a stream and a method, such as --config quickstart.yaml."
    reason = re.sub(r"^Expected a typing\.Literal\[(.*?)\]", r"it must be one of \1", reason)
    missing = reason.rpartition("arguments are required: ")[2]
    if missing in OF_THE_OTHER_FILE:
        return f"model.{missing} is missing; {OF_THE_OTHER_FILE[missing]}."
    reason = re.sub(r"^Unexpected import path format: *(.*\.ya?ml)$", r"no such file as '\1'", reason)
    reason = reason.replace("arguments are required: run.", "arguments are required: --")
    return with_suggestion(f"--{option}: {reason} (see --help)." if option else f"{reason.rstrip(' :')}.")
