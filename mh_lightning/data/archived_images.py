"""What image data sets that are read from their official archives, or from folders of images, have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mh_lightning.data.archives import unpack
from mh_lightning.data.image_folder import check_images_of
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.listing import LAYOUT, SPLITS, class_names_in, class_names_of_splits, list_images
from mh_lightning.data.splits import Splits, draw_stratified
from mh_lightning.data.stream import SPLIT_OPTIONS, StreamDataModule
from mh_lightning.data.transforms import IMAGENET, Normalization
from mh_lightning.errors import UNREADABLE, UserError, reason_of, require


class ArchivedImages(StreamDataModule):
    """Base of image data sets that are read as they are published, or from ``root/train/<class>/...`` and
    ``root/test/<class>/...``, which comes first. Photographs are not turned, as published; transparent pixels lie on
    white. Subclasses define `official`, and `read`.

    Args:
        root: folder of the archives or of what they hold, or the one above ``train`` and ``test``.
        check_images: decode each image file once before training, so that an unreadable one is named at the start.
        stream_options: options of `StreamDataModule`.

    Attributes:
        official: what belongs into root, to be told if it is not there.
        archives: names of the archives of each folder that is unpacked beside them; any one of them will do.
    """

    published_normalization: ClassVar[Normalization | None] = IMAGENET
    official: ClassVar[str]
    archives: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, root: str, check_images: bool = True, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.root, self.check_images = root, check_images

    @property
    def folder(self) -> Path:
        """`root` as a path."""
        return Path(self.root).expanduser()

    @property
    def layout(self) -> str:
        """All that would do."""
        return f"{self.official}, or {LAYOUT}"

    def prepare_data(self) -> None:
        """Unpack the archives, once; later runs find the folders."""
        if not self.has_class_folders():
            self.unpack()

    def unpack(self) -> None:
        """Unpack each of `archives` that is there."""
        for folder in self.archives:
            archive = self.archive_of(folder)
            if archive is not None:
                unpack(archive, self.folder / folder)

    def load(self) -> Splits:
        """Read what is there.

        Raises:
            UserError: if there is nothing, or something that cannot be used.
        """
        if self.has_class_folders():
            names = self.choose_classes(class_names_of_splits(self.folder, self.layout))
            train, test = list_images([self.folder / split for split in SPLITS], names)
        else:
            train, test, names = self.read()
        for split, part in zip(SPLITS, (train, test), strict=True):
            empty = sorted(set(range(len(names))) - set(part.labels.tolist()))
            if empty:
                raise UserError(
                    f"data.root={self.root!r}: the class {names[empty[0]]!r} has no {split} image; fetch the archives "
                    "again."
                )
        if self.check_images and not isinstance(train.inputs, Tensor):
            check_images_of(train, test)
        return Splits(train, test, names)

    @abstractmethod
    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """The training samples, the test samples and the names of the classes, as published."""

    def choose_classes(self, names: list[str]) -> list[str]:
        """The classes that are used, of all that are there: all of them."""
        return names

    def has_class_folders(self) -> bool:
        """Whether ``root/train`` or ``root/test`` is there."""
        return any((self.folder / split).is_dir() for split in SPLITS)

    def archive_of(self, folder: str) -> Path | None:
        """The archive of a folder, if it is there."""
        return next((path for name in self.archives[folder] if (path := self.folder / name).is_file()), None)

    def needed(self, name: str) -> Path:
        """A file or folder in root.

        Raises:
            UserError: if it is not there.
        """
        path = self.folder / name
        if path.exists():
            return path
        archive = self.archive_of(name) if name in self.archives else None
        if archive is not None:
            raise UserError(f"data.root={self.root!r}: {archive.name} is not unpacked; call prepare_data() before.")
        raise UserError(f"data.root={self.root!r} lacks {name}; it must hold {self.layout}.")


class UnsplitImages(ArchivedImages):
    """Base of those whose images are in one folder for each class, without a split of their own.

    Args:
        root: as for `ArchivedImages`.
        test_fraction: part of the images, in (0, 1), the same of each class, that is the test set: always the same
            random ones.
        check_images: as for `ArchivedImages`.
        stream_options: options of `StreamDataModule`.

    Attributes:
        images: the folder above those of the classes.
    """

    images: ClassVar[str]
    split_options: ClassVar[tuple[str, ...]] = (*SPLIT_OPTIONS, "test_fraction")

    def __init__(self, root: str, test_fraction: float = 0.2, check_images: bool = True, **stream_options: Any) -> None:
        super().__init__(root=root, check_images=check_images, **stream_options)
        require("data.test_fraction", test_fraction, above=0, below=1)
        self.test_fraction = test_fraction

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """List the images, and draw the test set."""
        folder = self.needed(self.images)
        names = self.choose_classes(class_names_in(folder, self.layout))
        (samples,) = list_images([folder], names)
        train, test = draw_stratified(samples, self.test_fraction, 0, "test_fraction", names)
        return samples.take(train), samples.take(test), names


def listed_images(
    folder: Path, listed: Sequence[tuple[str, int]], class_names: Sequence[str], source: Path
) -> Labelled:
    """The images that a published list names.

    Args:
        folder: that the listed paths start from.
        listed: path and class, from 0, of each image.
        class_names: name of each class.
        source: the file that lists them, to be named.

    Raises:
        UserError: if an image is missing, or a class is none.
    """
    for name, label in listed:
        if not 0 <= label < len(class_names):
            raise UserError(
                f"data.root: image {name}, listed in {str(source)!r}, has none of the {len(class_names)} classes; "
                "fetch the lists again."
            )
        if not (folder / name).is_file():
            raise UserError(
                f"data.root: {str(source)!r} lists image {name}, which is not in {str(folder)!r}; fetch it again."
            )
    return Labelled([str(folder / name) for name, _ in listed], np.array([label for _, label in listed], np.int64))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one sentence that a file cannot be used, whatever a library raises on it.

    Raises:
        UserError: names the file.
    """
    try:
        yield
    except (*UNREADABLE, MemoryError, OverflowError) as error:
        raise UserError(
            f"data.root: {str(path)!r} cannot be read ({reason_of(error)}): damaged, or no official file."
        ) from error
