"""The options of a stream: whether they can be used together, and whether a checkpoint comes from the same stream."""

import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from mh_lightning.data.blurry import BlurryBorders
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError, require

GOES_ON = "goes_on_from"  # in a checkpoint, what the model had learnt from other streams
AT_LEAST_ONE = (
    "epochs_per_task",
    "batch_size",
    "eval_batch_size",
    "evaluate_every_n_tasks",
    "max_train_samples",
    "max_test_samples",
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `StreamDataModule` that cannot be used, or not together.

    Args:
        options: by name.

    Raises:
        UserError: names the option.
    """
    for name in AT_LEAST_ONE:
        require(f"data.{name}", options[name], at_least=1, whole=True)
    require("data.image_transforms", options["image_transforms"], one_of=get_args(ImageTransforms))
    require("data.num_workers", options["num_workers"], at_least=0)
    require("data.split_seed", options["split_seed"], at_least=0, below=2**32)
    require("data.validation_fraction", options["validation_fraction"], at_least=0, below=1)
    require("data.imbalance_ratio", options["imbalance_ratio"], at_least=1, below=math.inf)
    require("data.label_noise", options["label_noise"], at_least=0, below=1)
    if not isinstance(options["blurry_borders"], BlurryBorders | None):
        raise UserError(
            f"data.blurry_borders must be an object such as mh_lightning.data.IBlurry(), got "
            f"{options['blurry_borders']!r}."
        )
    if options["blurry_borders"] is not None and options["scenario"] in ("IID", "CDID"):
        raise UserError(
            f"data.blurry_borders: data.scenario={options['scenario']} has no borders to blur; use CI, DI or CDI."
        )
    chunk_size, batch_size, cache = options["chunk_size"], options["batch_size"], options["feature_cache"]
    if chunk_size is not None and (chunk_size < 1 or chunk_size % batch_size):
        raise UserError(f"data.chunk_size={chunk_size} must be a multiple of data.batch_size={batch_size}.")
    if cache is not None and cache.views > 1 and not options["augment"]:
        raise UserError(f"data.feature_cache.views={cache.views} needs data.augment=true.")
    if options["validation_fraction"] and options["split_fractions"] is not None:
        raise UserError("data.validation_fraction and data.split_fractions exclude each other; give one.")


def check_same_stream(saved: dict[str, Any], own: dict[str, Any], names: Collection[str] | None = None) -> None:
    """Compare the stream of a checkpoint with this one, in all or in some of what `state_dict` tells.

    Raises:
        UserError: if they differ.
    """
    for name, value in saved.items():
        if names is None and name == GOES_ON and value != own[name]:
            raise UserError(
                f"ckpt_path: the run went on from a model of {value}, and this one is of {own[name]}; resume it with "
                "the continue_from that it began with, in Python with the model that mh_lightning.load gives of that."
            )
        if (names is None or name in names) and value != own[name]:
            raise UserError(
                f"ckpt_path: the checkpoint comes from another stream, with {name} {value} instead of {own[name]}; "
                "use the configuration it was trained with."
            )
