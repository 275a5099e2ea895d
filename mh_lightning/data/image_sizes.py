"""Sizes of image files, looked at before training where no transform makes them equal."""

from collections.abc import Iterable, Iterator
from itertools import chain

from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from mh_lightning.data.images import ImageReading, read_image
from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError

TURNED = 5  # from this orientation on, width and height change places


def check_image_sizes(parts: Iterable[Labelled]) -> None:
    """Compare the sizes of all image files of some splits, by their headers.

    Raises:
        UserError: names the first one whose size is another, or that cannot be read.
    """
    sizes = chain.from_iterable(map(_sizes, parts))
    first = next(sizes, None)
    other = next((size for size in sizes if first is not None and size[1:] != first[1:]), None)
    if first is not None and other is not None:
        one, two = (f"{width} x {height} pixels ({name})" for name, width, height in (first, other))
        raise UserError(
            f"data: images are of different sizes, {one} and {two}, and model.init_args.backbone has no transform that "
            "makes them equal; give mh_lightning.backbones.ModuleBackbone with an image_size, or resize the images."
        )


def _sizes(samples: Labelled) -> Iterator[tuple[str, int, int]]:
    """Path, width and height of each image file; the images of a tensor are of one size."""
    source = samples.inputs.source if isinstance(samples.inputs, Rows) else samples.inputs
    if not isinstance(source, Tensor | StoredFeatures):
        for path in map(str, samples.inputs):
            yield path, *size_of_image(path, samples.reading)


def size_of_image(path: str, reading: ImageReading) -> tuple[int, int]:
    """Width and height of an image file as `read_image` gives it, without reading its pixels if that can be told."""
    try:
        with Image.open(path) as image:
            turned = reading.upright and image.getexif().get(ExifTags.Base.Orientation, 1) >= TURNED
            if not turned:
                return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        pass  # reading it says what is wrong
    return read_image(path, reading).size
