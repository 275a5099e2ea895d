"""mini-ImageNet: 60,000 colour images of 84 x 84 pixels, 100 classes (Vinyals et al. 2016)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mh_lightning.data.array_pickle import as_array, read_array_pickle
from mh_lightning.data.image_folder import check_images_of
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.listing import class_names_in, list_images
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UNREADABLE, UserError, reason_of

PARTS = ("train", "val", "test")
SAMPLES_OF_CLASS = 600  # in archives without class_dict

Images = NDArray[np.uint8]
Indices = dict[str, NDArray[np.int64]]


class MiniImageNet(StreamDataModule):
    """Stream of mini-ImageNet. Its published parts hold different classes, so that all of them make one data set, and
    `split_fractions` cuts each class into training, validation and test samples.

    Args:
        root: folder of the three published files ``mini-imagenet-cache-train.pkl``, ``-val.pkl`` and ``-test.pkl``,
            which are read without running any code in them; or of images in ``root/<class>/...``. Classes are in the
            order of the files, or in alphabetical order.
        check_images: of a folder of images, decode each once before training, so that an unreadable one is named at
            the start.
        split_fractions: of training, validation and test samples of each class.
        stream_options: options of `StreamDataModule`.
    """

    def __init__(
        self,
        root: str,
        check_images: bool = True,
        split_fractions: list[float] | None = [0.7, 0.1, 0.2],  # noqa: B006  # shown by --help, never changed
        **stream_options: Any,
    ) -> None:
        super().__init__(split_fractions=split_fractions, **stream_options)
        self.root, self.check_images = root, check_images

    def load(self) -> Splits:
        """Read the archives, or list the images."""
        root = Path(self.root).expanduser()
        archives = [root / f"mini-imagenet-cache-{part}.pkl" for part in PARTS]
        if not any(path.is_file() for path in archives):
            return self._load_folder(root)
        for path in archives:
            if not path.is_file():
                raise UserError(f"data.root={self.root!r} lacks {path.name}; all three archives are needed.")
        images, classes = _joined([_read_archive(path) for path in archives])
        labels = np.empty(len(images), dtype=np.int64)
        for label, indices in enumerate(classes.values()):
            labels[indices] = label
        return Splits(Labelled(torch.from_numpy(images), labels), None, list(classes))

    def _load_folder(self, root: Path) -> Splits:
        names = class_names_in(root, "mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl, or root/<class>/")
        if {"train", "test"} <= set(names):
            raise UserError(
                f"data.root={self.root!r} holds the folders train and test; put the folders of all classes next to "
                "each other, since data.split_fractions divides each class."
            )
        (samples,) = list_images([root], names)
        if self.check_images:
            check_images_of(samples)
        return Splits(samples, None, names)


def _read_archive(path: Path) -> tuple[Images, Indices]:
    try:
        content = read_array_pickle(path)
        if not isinstance(content, dict) or "image_data" not in content:
            raise ValueError("it holds no image_data")
        images, listed = as_array(content["image_data"]), content.get("class_dict")
        classes = None if listed is None else {str(name): _indices(listed[name]) for name in listed}
    except (*UNREADABLE, MemoryError, OverflowError) as error:
        raise UserError(
            f"data.root: {str(path)!r} cannot be read ({reason_of(error)}): damaged, or no archive of mini-ImageNet."
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise UserError(
            f"data.root: image_data of {str(path)!r} must hold images of type uint8 and shape (samples, height, width, "
            f"3), got {images.dtype} of shape {images.shape}."
        )
    if classes is None:
        return images, _classes_in_turn(len(images), path)
    indices = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *classes.values()]))
    if not np.array_equal(indices, np.arange(len(images))) or not all(map(len, classes.values())):
        raise UserError(
            f"data.root: class_dict of {str(path)!r} must list each of the {len(images)} samples for one class, and "
            "for each class some; fetch the file again."
        )
    return images, dict(sorted(classes.items(), key=lambda item: int(item[1].min())))


def _indices(listed: Any) -> NDArray[np.int64]:
    indices = as_array(listed)
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise TypeError("class_dict does not list indices of samples")
    return indices.astype(np.int64)


def _classes_in_turn(samples: int, path: Path) -> Indices:
    if samples % SAMPLES_OF_CLASS:
        raise UserError(
            f"data.root: {str(path)!r} has no class_dict, and its {samples} samples are no multiple of the "
            f"{SAMPLES_OF_CLASS} of each class; fetch the file again."
        )
    part = path.stem.rpartition("-")[2]
    parts = np.arange(samples).reshape(-1, SAMPLES_OF_CLASS)
    return {f"{part} {number}": indices for number, indices in enumerate(parts)}


def _joined(archives: list[tuple[Images, Indices]]) -> tuple[Images, Indices]:
    sizes = {images.shape[1:] for images, _ in archives}
    if len(sizes) > 1:
        raise UserError(f"data.root: the archives must hold images of one size, got {sorted(sizes)}.")
    classes: Indices = {}
    start = 0
    for images, indices_of in archives:
        for name, indices in indices_of.items():
            if name in classes:
                raise UserError(f"data.root: class {name!r} is in two of the archives; fetch them again.")
            classes[name] = start + indices
        start += len(images)
    return np.concatenate([images for images, _ in archives]), classes
