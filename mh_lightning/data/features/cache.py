"""The feature cache of a stream: each image passes through a frozen backbone once."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.data.features.extraction import check_frozen, extract
from mh_lightning.data.features.fingerprint import description_of, fingerprint
from mh_lightning.data.features.store import Entry
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError, require

MOST_WORKERS = 8


@dataclass(frozen=True)
class FeatureCache:
    """Where features of images are kept, and how.

    Features are found by the content of the image, which a file's path, size and time of change stand for once it was
    read, and by all that they depend on: the backbone's name, weights, transform, image size, the number of views and
    the type of number. Other weights or another transform make another entry; other data sets, splits and subsets share
    one. The backbone computes in float32, or as below, whatever the trainer's precision is.

    Args:
        folder: where the entries go; it is made if need be.
        dtype: of the numbers on disk: "float32" gives what the backbone gives; "float16" takes half the room, and is
            computed in bfloat16 where the device multiplies such numbers faster.
        views: at least 1 random view of each training image, drawn once, with `data.augment`; each epoch draws one of
            them for each sample.
        num_workers: at least 0 processes that read and transform images, by default as many as there are processors
            where a GPU computes, up to 8, otherwise those of the data module.

    Raises:
        UserError: if `views` is not positive or `num_workers` is negative.
    """

    folder: str
    dtype: Literal["float32", "float16"] = "float32"
    views: int = 1
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("data.feature_cache.folder is empty; give a folder such as data/features.")
        require("data.feature_cache.dtype", self.dtype, one_of=("float32", "float16"))
        require("data.feature_cache.views", self.views, at_least=1)
        require("data.feature_cache.num_workers", self.num_workers, at_least=0)

    def features(
        self,
        digests: list[bytes],
        image: Callable[[int], Tensor],
        backbone: Backbone,
        transform: Callable[[Any], Tensor] | None,
        *,
        augment: bool,
        device: torch.device,
        num_workers: int = 0,
        local_ranks: int = 1,
        quiet: bool = True,
    ) -> StoredFeatures:
        """Features of images, extracted now if they are not there yet.

        Args:
            digests: of the images' content.
            image: a sample's tensor, transformed, by its place.
            backbone: frozen.
            transform: that `image` applies.
            augment: whether it is the random one of training.
            device: what computes.
            num_workers: of the data module.
            local_ranks: processes on this machine that do the same.
            quiet: no progress bar.

        Raises:
            UserError: if the backbone is trained, or the folder cannot be written.
        """
        check_frozen(backbone)
        if digests:
            with isolate_rng():
                backbone.prepare(image(0).unsqueeze(0))
        half = self.dtype == "float16" and gains_from_bfloat16(device)
        compute_dtype = torch.bfloat16 if half else torch.float32
        description = {
            **description_of(backbone, transform),
            "views": f"{self.views} random" if augment else "1",
            "dtype": self.dtype,
            "computed in": str(compute_dtype).removeprefix("torch."),
        }
        name = re.sub(r"\W+", "_", str(backbone.settings().get("name", type(backbone).__name__)))
        entry = Entry(Path(self.folder).expanduser() / f"{name}-{fingerprint(description)[:16]}")
        entry.describe({**description, "transform": " ".join(repr(transform).split())})
        if self.num_workers is not None:
            num_workers = self.num_workers
        elif device.type == "cuda":
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = max(num_workers, min(processors // local_ranks, MOST_WORKERS))
        found = entry.find(digests)
        while len(found) < len(set(digests)):  # more than once only if a shard is damaged meanwhile
            with isolate_rng():  # a run draws the same, whether its features were there or not
                extract(
                    entry,
                    digests,
                    image,
                    backbone,
                    device=device,
                    dtype=getattr(torch, self.dtype),
                    compute_dtype=compute_dtype,
                    views=self.views if augment else None,
                    num_workers=num_workers,
                    quiet=quiet,
                )
            found = entry.find(digests)
        return _gathered(digests, found)


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions of its own for bfloat16, which take half the time
    (docs/performance_details.md).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, name, bool)()) for name in instructions)


def _gathered(digests: list[bytes], found: dict[bytes, Any]) -> StoredFeatures:
    shards = list({shard.path: shard for shard, _ in found.values()}.values())
    numbers = {shard.path: number for number, shard in enumerate(shards)}
    places: NDArray[np.int64] = np.array(
        [(numbers[found[digest][0].path], found[digest][1]) for digest in digests], dtype=np.int64
    )
    return StoredFeatures([shard.features.numpy() for shard in shards], places.reshape(-1, 2))
