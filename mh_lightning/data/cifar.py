"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32 x 32 pixels each (Krizhevsky 2009)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from mh_lightning.data.archived_images import ArchivedImages, reading
from mh_lightning.data.archives import read_files
from mh_lightning.data.array_pickle import as_array, read_array_pickle
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.transforms import ImageTransforms, Normalization
from mh_lightning.errors import UserError

SHAPE = (3, 32, 32)
# of the training images, as SLCA's code has them
CIFAR10_NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_NORMALIZATION = Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


class CIFAR10(ArchivedImages):
    """Stream of CIFAR-10: 50,000 training and 10,000 test images of 10 classes, as published, or as folders of images.

    Args:
        root: folder of ``cifar-10-python.tar.gz`` or of its folder ``cifar-10-batches-py``, which are read without
            running any code in them; or of images in ``root/train/<class>/...`` and ``root/test/<class>/...``.
        download: fetch the archive if it is not there.
        check_images: of folders of images, decode each once before training, so that an unreadable one is named at
            the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    published_normalization = CIFAR10_NORMALIZATION
    official = "cifar-10-python.tar.gz or its folder cifar-10-batches-py"
    archives: ClassVar = {"cifar-10-batches-py": ("cifar-10-python.tar.gz",)}
    files: ClassVar[tuple[Sequence[str], Sequence[str]]] = (
        [f"data_batch_{number}" for number in range(1, 6)],
        ["test_batch"],
    )
    label_key = "labels"
    names_file, names_key = "batches.meta", "label_names"
    source = torchvision.datasets.CIFAR10

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        check_images: bool = True,
        image_transforms: ImageTransforms = "jittered_random_resized_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)
        self.download = download

    def unpack(self) -> None:
        """Fetch the archive when asked to; it is read as it is."""
        folder, archive = self._names()
        if not self.download or (self.folder / folder).is_dir() or (self.folder / archive).is_file():
            return
        part = f"{archive}.part"  # so that half an archive does not look like one
        try:
            torchvision.datasets.utils.download_url(self.source.url, self.folder, part, self.source.tgz_md5)
            (self.folder / part).rename(self.folder / archive)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.download=true: {archive} could not be fetched to {self.root!r} ({error})."
            ) from error

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """Read the batches, from the folder if there is one, and otherwise out of the archive."""
        contents = self._contents()
        train, test = (_joined([self._batch(name, contents[name]) for name in names]) for names in self.files)
        with reading(self._path_of(self.names_file)):
            listed = _entry(read_array_pickle(contents[self.names_file]), self.names_key)
            if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
                raise TypeError(f"{self.names_key} lists no names")
        return train, test, listed

    def _names(self) -> tuple[str, str]:
        ((folder, (archive,)),) = self.archives.items()
        return folder, archive

    def _path_of(self, name: str) -> Path:
        return self.folder / self._names()[0] / name

    def _contents(self) -> dict[str, bytes]:
        folder, archive = self._names()
        needed = [*self.files[0], *self.files[1], self.names_file]
        if (self.folder / folder).is_dir():
            paths = [self._path_of(name) for name in needed]
            contents = {path.name: path.read_bytes() for path in paths if path.is_file()}
        elif (self.folder / archive).is_file():
            contents = read_files(self.folder / archive, folder, needed)
        else:
            raise UserError(
                f"data.root={self.root!r} holds no {type(self).__name__}; it must hold {self.layout}; or give "
                "download=true."
            )
        for name in needed:
            if name not in contents:
                raise UserError(f"data.root={self.root!r}: {folder} lacks {name}; fetch {archive} again.")
        return contents

    def _batch(self, name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        with reading(self._path_of(name)):
            batch = read_array_pickle(content)
            images, labels = as_array(_entry(batch, "data")), as_array(_entry(batch, self.label_key))
            if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != np.prod(SHAPE):
                raise ValueError(f"images of type {images.dtype} and shape {images.shape}")
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                raise ValueError(f"labels of shape {labels.shape} for {len(images)} images")
        return images, labels.astype(np.int64)


class CIFAR100(CIFAR10):
    """Stream of CIFAR-100: 50,000 training and 10,000 test images of 100 classes (the fine ones), as published, or as
    folders of images.

    Args:
        root: folder of ``cifar-100-python.tar.gz`` or of its folder ``cifar-100-python``, which are read without
            running any code in them; or of images in ``root/train/<class>/...`` and ``root/test/<class>/...``.
        download: fetch the archive if it is not there.
        check_images: of folders of images, decode each once before training, so that an unreadable one is named at
            the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    published_normalization = CIFAR100_NORMALIZATION
    official = "cifar-100-python.tar.gz or its folder cifar-100-python"
    archives: ClassVar = {"cifar-100-python": ("cifar-100-python.tar.gz",)}
    files: ClassVar[tuple[Sequence[str], Sequence[str]]] = (["train"], ["test"])
    label_key = "fine_labels"
    names_file, names_key = "meta", "fine_label_names"
    source = torchvision.datasets.CIFAR100


def _entry(content: Any, key: str) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"it holds no {key}")
    return content[key]


def _joined(batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> Labelled:
    images = np.concatenate([images for images, _ in batches]).reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return Labelled(torch.from_numpy(np.ascontiguousarray(images)), np.concatenate([labels for _, labels in batches]))
