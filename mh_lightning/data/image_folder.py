"""Streams over folders of images, one folder a class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from tqdm import tqdm

from mh_lightning.data.images import UNREADABLE_IMAGE, ImageReading, as_rgb, colour_of
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.listing import SPLITS, class_names_of_splits, list_images
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import SPLIT_OPTIONS, StreamDataModule
from mh_lightning.errors import UserError


class ImageFolder(StreamDataModule):
    """Stream of images in ``root/train/<class>/...`` and ``root/test/<class>/...``; classes in alphabetical order.

    Links are followed, and a folder that several lead to is counted once; files and folders whose names begin with a
    dot are left out at every level. Grey images of up to 16 bits are scaled by their range; those of 32 bits, whose
    range nothing tells, and signed numbers are refused.

    Args:
        root: the folder above ``train`` and ``test``.
        check_images: decode each image once before training, so that an unreadable one is named at the start, and
            files of several frames or pages, of which the first is used, are counted.
        ground: colour that transparent pixels lie on, by name or number, such as white or #808080.
        upright: turn photographs as their EXIF orientation says.
        stream_options: options of `StreamDataModule`.
    """

    split_options: ClassVar[tuple[str, ...]] = (*SPLIT_OPTIONS, "ground", "upright")

    def __init__(
        self,
        root: str,
        check_images: bool = True,
        ground: str = "white",
        upright: bool = True,
        **stream_options: Any,
    ) -> None:
        super().__init__(**stream_options)
        self.root, self.check_images = root, check_images
        self.ground, self.upright = ground, upright
        self._reading = ImageReading(colour_of(ground, "ground"), upright)

    def load(self) -> Splits:
        """List the images and, if asked to, try them."""
        root = Path(self.root).expanduser()
        names = class_names_of_splits(root)
        listed = list_images([root / split for split in SPLITS], names)
        train, test = (part._replace(reading=self._reading) for part in listed)
        if self.check_images:
            check_images_of(train, test)
        return Splits(train, test, names)


def check_images_of(*parts: Labelled) -> None:
    """Decode each image once, and tell how many files hold more than their first image.

    Raises:
        UserError: names the first that cannot be read.
    """
    paths = [(path, part.reading) for part in parts for path in part.inputs]
    several: list[str] = []
    rank_zero_info(f"Checking {len(paths)} images; data.check_images=false leaves this out.")
    with ThreadPoolExecutor() as pool:
        checked = pool.map(_has_more_frames, paths)
        for path, _ in tqdm(paths, desc="images", unit="", disable=len(paths) < 1000):
            try:
                if next(checked):
                    several.append(path)
            except UNREADABLE_IMAGE as error:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"data.root: image {path!r} cannot be read ({error}); mend or remove it.") from error
    if several:
        rank_zero_info(
            f"data.root: of {len(several)} image files with several frames or pages (such as {several[0]!r}), the "
            "first is used."
        )


def _has_more_frames(source: tuple[str, ImageReading]) -> bool:
    path, reading = source
    with Image.open(path) as image:
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # a photograph and its previews
        image.draft("L", (1, 1))  # JPEG files are decoded at an eighth of their size: enough to find damage
        as_rgb(image, reading)
        return several
