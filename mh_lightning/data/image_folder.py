"""Streams over folders of images, one folder a class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splitting import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UserError

SPLITS = ("train", "test")
LAYOUT = "root/train/<class>/ and root/test/<class>/"


class ImageFolder(StreamDataModule):
    """Stream of images in ``root/train/<class>/...`` and ``root/test/<class>/...``; classes in alphabetical order.

    Args:
        root: the folder above ``train`` and ``test``.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        stream_options: options of `StreamDataModule`.
    """

    def __init__(self, root: str, check_images: bool = True, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.root, self.check_images = root, check_images

    def load(self) -> Splits:
        """List the images and, if asked to, try them."""
        root = Path(self.root).expanduser()
        names = class_names_of_splits(root)
        train, test = (list_images(root / split, names) for split in SPLITS)
        if self.check_images:
            check_images_of(train, test)
        return Splits(train, test, names)


def class_names_of_splits(root: Path, layout: str = LAYOUT) -> list[str]:
    """The names of the class folders, which are the same in ``root/train`` and ``root/test``, in alphabetical order.

    Args:
        root: the folder above.
        layout: what belongs where, to be told if there is none.

    Raises:
        UserError: if a folder is missing, or a class is in one of them only.
    """
    train, test = (class_names_in(root / split, layout) for split in SPLITS)
    if train != test:
        differ = min(set(train) ^ set(test))
        raise UserError(
            f"data.root={str(root)!r}: train and test must hold the same classes; {differ!r} is in "
            f"{'train' if differ in train else 'test'} only."
        )
    return train


def class_names_in(folder: Path, layout: str) -> list[str]:
    """The names of the folders in `folder`, hidden ones left out, in alphabetical order.

    Args:
        folder: of a folder for each class.
        layout: what belongs where, to be told if there is none.

    Raises:
        UserError: if there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"data.root: the folder {str(folder)!r} does not exist; images belong into {layout}.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"data.root: {str(folder)!r} holds no class folder; images belong into {layout}.")
    return names


def list_images(folder: Path, class_names: list[str]) -> Labelled:
    """The paths of the images in ``folder/<class>``, however deep, class after class in alphabetical order.

    Raises:
        UserError: names a class without images.
    """
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        images = sorted(str(path) for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise UserError(
                f"data.root: the class folder {str(folder / name)!r} holds no image "
                f"({', '.join(IMG_EXTENSIONS)}); fill or remove it."
            )
        paths += images
        labels += [label] * len(images)
    return Labelled(paths, np.array(labels))


def check_images_of(*parts: Labelled) -> None:
    """Decode each image once.

    Raises:
        UserError: names the first that cannot be read.
    """
    paths = [path for part in parts for path in part.inputs]
    rank_zero_info(f"Checking {len(paths)} images; data.check_images=false leaves this out.")
    with ThreadPoolExecutor() as pool:
        failures = tqdm(pool.map(_failure, paths), total=len(paths), desc="images", unit="", disable=len(paths) < 1000)
        for path, failure in zip(paths, failures, strict=True):
            if failure is not None:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"data.root: image {path!r} cannot be read ({failure}); mend or remove it.")


def _failure(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("L", (1, 1))  # JPEG files are decoded at an eighth of their size: enough to find damage
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return None
