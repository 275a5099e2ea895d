"""Passing images through a frozen backbone, as fast as the machine can, into the shards of an entry."""

import hashlib
import inspect
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mh_lightning.backbones import Backbone
from mh_lightning.backbones.base import check_features, mode_of
from mh_lightning.data.features.code import names_in
from mh_lightning.data.features.fingerprint import view_seeds
from mh_lightning.data.features.store import Entry
from mh_lightning.data.labelled import stacked
from mh_lightning.errors import UserError
from mh_lightning.files import release, try_lock

SHARD_IMAGES = 1024  # what a killed process loses at most
IMAGES_OF_A_WORKER = 32  # at once, since they go through shared memory, which is scarce in containers
SECONDS_BETWEEN_LOOKS = 0.5


class Views(Dataset[Tensor]):
    """The views of images: with several, each drawn with a seed of its own, from the image's content.

    Args:
        image: a sample's tensor, transformed, by its place.
        digests: of the images.
        views: of each image.
    """

    def __init__(self, image: Callable[[int], Tensor], digests: Sequence[bytes], views: int | None) -> None:
        self.image, self.digests, self.views = image, digests, views

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, place: int) -> Tensor:
        """(views, channels, height, width)."""
        if self.views is None:
            return self.image(place).unsqueeze(0)
        views = []
        for seed in view_seeds(self.digests[place], self.views).tolist():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  # transforms of other packages draw from it
            views.append(self.image(place))
        return torch.stack(views)


class Blocks:
    """Hands out blocks of images, each to one process only, until the entry holds them all.

    A block that another process works on is left to it, and looked at again later: it may have been killed. Locks are
    those of the operating system, which end with their process.
    """

    def __init__(self, entry: Entry, digests: Sequence[bytes], bar: Any) -> None:
        self.entry, self.bar = entry, bar
        places = {digest: place for place, digest in reversed(list(enumerate(digests)))}  # the first of equal images
        wanted = sorted(places.items(), key=lambda item: item[1])
        self.waiting = [dict(wanted[start : start + SHARD_IMAGES]) for start in range(0, len(wanted), SHARD_IMAGES)]
        self.claimed: deque[tuple[dict[bytes, int], FileLock]] = deque()

    def claim(self, batch_size: int) -> Iterator[list[int]]:
        """Places of images, batch by batch, of the blocks that are free; each block then waits in `claimed`."""
        taken = []
        for block in self.waiting:
            try:
                lock = try_lock(self.entry.folder / f"{_name_of(block)}.lock")
            except OSError as error:
                raise UserError(
                    f"data.feature_cache.folder: {str(self.entry.folder)!r} takes no locks ({error}); give a folder "
                    "that can be written to, on a disk that has file locks."
                ) from error
            if lock is None:
                taken.append(block)
                continue
            missing = dict(block)
            self.claimed.append((missing, lock))
            for digest in self.entry.find([*block]):
                del missing[digest]
            self.bar.update(len(block) - len(missing))
            if not missing:
                release(self.claimed.pop()[1])
                continue
            places = list(missing.values())
            yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))
        self.waiting = taken

    def finish(self, features: Tensor) -> None:
        """Write the features (images, views, d) of the block that was claimed first."""
        missing, lock = self.claimed[0]
        self.entry.write(_name_of(missing), list(missing), features)
        self.claimed.popleft()
        release(lock)

    def release_all(self) -> None:
        """Leave what is not finished to others."""
        while self.claimed:
            release(self.claimed.popleft()[1])


def _name_of(images: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(images), digest_size=8).hexdigest()


def extract(
    entry: Entry,
    digests: Sequence[bytes],
    image: Callable[[int], Tensor],
    backbone: Backbone,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    views: int | None,
    num_workers: int,
    quiet: bool,
) -> None:
    """Fill an entry with the features of images, those that it does not hold yet.

    Other processes may do the same at the same time, ranks of one run among them: they share the work.

    Args:
        entry: where the features go.
        digests: of the images.
        image: a sample's tensor, transformed, by its place.
        backbone: frozen; it ends up on `device`.
        device: what computes.
        dtype: of the features on disk.
        compute_dtype: float32, or bfloat16 to let autocast take it.
        views: random views of each image, or None for the one view of a fixed transform.
        num_workers: processes that read and transform images.
        quiet: no progress bar.
    """
    check_frozen(backbone)
    forward = Forward(backbone.to(device), device, compute_dtype)
    with (
        mode_of(backbone, training=False),
        tqdm(total=len(set(digests)), desc="Features", unit=" images", disable=quiet, smoothing=0.05) as bar,
    ):
        blocks = Blocks(entry, digests, bar)
        try:
            while blocks.waiting:
                batches = blocks.claim(max(1, IMAGES_OF_A_WORKER // (views or 1)))
                loader: DataLoader[Tensor] = DataLoader(
                    Views(image, digests, views),
                    batch_sampler=batches,
                    num_workers=num_workers,
                    pin_memory=device.type == "cuda",
                    generator=torch.Generator(),
                    collate_fn=stacked,
                )
                _extract_blocks(blocks, loader, forward, dtype)
                if blocks.waiting:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            blocks.release_all()


def check_frozen(backbone: Backbone) -> None:
    """Refuse a backbone that training would change, or that is another one in training mode.

    Raises:
        UserError: says why.
    """
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise UserError(
            "data.feature_cache needs a frozen backbone, and model.init_args.backbone is trained; set its "
            "frozen=true, which a plain module has as the module of mh_lightning.backbones.ModuleBackbone, or leave "
            "the cache out."
        )
    for mode in (True, False):
        with mode_of(backbone, mode):
            in_training = {type(one): None for one in backbone.modules() if one.training}
        other = [kind.__name__ for kind in in_training if _minds_its_mode(kind)]
        if other:
            raise UserError(
                f"data.feature_cache needs a backbone that is the same in training, and model.init_args.backbone has "
                f"{other[0]}; let its train() keep it in evaluation mode, as TimmBackbone's does, or leave the cache "
                "out."
            )


def _minds_its_mode(kind: type[nn.Module]) -> bool:
    """Whether a module's code asks if it is in training, as that of dropout and batch norm does."""
    own_classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [one for base in own_classes for one in vars(base).values() if isinstance(one, FunctionType)]
    return any("training" in names_in(inspect.unwrap(one).__code__) for one in functions)


def _extract_blocks(blocks: Blocks, loader: DataLoader[Tensor], forward: "Forward", dtype: torch.dtype) -> None:
    collected: list[Tensor] = []
    waiting: list[Tensor] = []
    for images in loader:
        waiting.append(images)
        missing = len(blocks.claimed[0][0]) - sum(map(len, collected)) - sum(map(len, waiting))
        if missing and sum(part.shape[0] * part.shape[1] for part in waiting) < forward.batch_size:
            continue
        together, waiting = torch.cat(waiting), []
        features = forward(together.flatten(0, 1)).to("cpu", dtype)
        features = features.view(*together.shape[:2], -1)
        if not bool(features.isfinite().all()):
            raise UserError(
                "data.feature_cache: the backbone gives NaN or infinite features"
                + (
                    ", or larger ones than float16 holds; use dtype float32, or check model.init_args.backbone."
                    if dtype == torch.float16
                    else "; check model.init_args.backbone's weights."
                )
            )
        collected.append(features)
        blocks.bar.update(len(together))
        if not missing:
            blocks.finish(torch.cat(collected))
            collected = []


class Forward:
    """A backbone without gradients, on batches as large as the device bears."""

    def __init__(self, backbone: Backbone, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.backbone, self.device, self.compute_dtype = backbone, device, compute_dtype
        self.batch_size = 512 if device.type == "cuda" else 32  # on a CPU, what fits into its caches

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (b, d) of images (b, channels, height, width)."""
        try:
            return torch.cat([self._features(part) for part in torch.split(images, self.batch_size)])
        except torch.cuda.OutOfMemoryError as error:
            if self.batch_size == 1:
                raise UserError(
                    "data.feature_cache: one image is too much for the device's memory; use a smaller image_size."
                ) from error
            self.batch_size //= 2
        return self(images)

    def _features(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            features = check_features(self.backbone(images), len(images), self.backbone.num_features)
        return features.float()
