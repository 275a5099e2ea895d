"""What each option of a run decides, for resuming, for the runner of many runs, and for the grouping by streams."""

import re
from collections.abc import Iterator
from enum import Enum
from pprint import pformat
from typing import Any


class Role(Enum):
    """What follows from another value of an option."""

    FREE = "nothing that a run finds"
    MACHINE = "at most the last bits: it says what computes, not what"
    CHANGEABLE = "another run, but one run may go on with it, and says so: where things lie, how long it trains"
    RESULT = "another result on the same stream"
    STREAM = "another stream"


# the first that fits; names are those of the command line's short form
ROLES = (
    (r"config|run_dir|experiment|ckpt_path|verbose|pictures", Role.FREE),
    (r"trainer\.(enable_\w+|logger|default_root_dir)(\..*)?", Role.FREE),
    (r"trainer\.strategy\.(ddp_comm_\w+|precision_plugin|model_averaging_period)(\..*)?", Role.RESULT),
    (
        r"num_threads|trainer\.(devices|num_nodes|accelerator|strategy|benchmark|deterministic|profiler"
        r"|log_every_n_steps)(\..*)?",
        Role.MACHINE,
    ),
    (r"data\.(num_workers|eval_batch_size|feature_cache\.(folder|num_workers))|model\.backbone\.compile", Role.MACHINE),
    (r"data\.(root|path)|model\.backbone\.(checkpoint_path|pretrained|in_checkpoints)", Role.CHANGEABLE),
    (
        r"trainer\.(precision|plugins|callbacks|accumulate_grad_batches|gradient_clip_\w+|limit_train_batches"
        r"|limit_val_batches|overfit_batches|sync_batchnorm|use_distributed_sampler)(\..*)?",
        Role.RESULT,
    ),
    (r"trainer\..*", Role.CHANGEABLE),
    (r"data\.(batch_size|chunk_size|epochs_per_task|augment|feature_cache(\..*)?|class_order_seed)", Role.RESULT),
    (r"data\..*", Role.STREAM),
    (r".*", Role.RESULT),
)


def role_of(option: str) -> Role:
    """What an option decides.

    Args:
        option: as on the command line, with or without ``init_args``.

    Example:
        >>> role_of("data.init_args.increment").name, role_of("trainer.devices").name, role_of("pictures").name
        ('STREAM', 'MACHINE', 'FREE')
    """
    name = option.replace(".init_args", "")
    return next(role for pattern, role in ROLES if re.fullmatch(pattern, name))


def leaves(configuration: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by their dotted names."""
    for name, value in configuration.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def of_roles(configuration: dict[str, Any], *roles: Role) -> dict[str, Any]:
    """The values of a configuration whose options have one of the roles, by their dotted names.

    Example:
        >>> of_roles({"pictures": True, "data": {"init_args": {"increment": 2, "batch_size": 8}}}, Role.STREAM)
        {'data.init_args.increment': 2}
    """
    return {name: value for name, value in leaves(configuration) if role_of(name) in roles}


def is_same_option(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type, at every depth: of batches, 1 is one and 1.0 all of them.

    Example:
        >>> is_same_option(1, 1), is_same_option(1, 1.0), is_same_option({"a": [1]}, {"a": [True]})
        (True, False, False)
    """
    return pformat(one) == pformat(other)  # which sorts the keys
