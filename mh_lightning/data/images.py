"""Image files as RGB: what their numbers, transparent pixels and orientation mean."""

from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from mh_lightning.errors import UNREADABLE, UserError

UNREADABLE_IMAGE = (*UNREADABLE, SyntaxError, Image.DecompressionBombError)
WHITE = (255, 255, 255)
LARGEST_OF_16_BITS = 65535
SIGNED = 2  # of sample formats
SCALES_OF_GREY = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey of 2 and 4 bits by


class ImageReading(NamedTuple):
    """How image files are read.

    Args:
        ground: what transparent pixels lie on: red, green and blue.
        upright: turn photographs as their EXIF orientation says. TIFF files always are, by Pillow.
    """

    ground: tuple[int, int, int] = WHITE
    upright: bool = False


def colour_of(text: str, option: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, by its name or number.

    Raises:
        UserError: names the option if there is no such colour, or it is transparent itself.

    Example:
        >>> colour_of("white", "ground"), colour_of("#ff8000", "ground")
        ((255, 255, 255), (255, 128, 0))
    """
    try:
        red, green, blue = bytes(ImageColor.getrgb(text))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"data.{option} must be an opaque colour, by name or number, such as white or #808080; got {text!r}."
        ) from error
    return red, green, blue


def read_image(path: str, reading: ImageReading) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: names the file if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image, reading)
    except UNREADABLE_IMAGE as error:
        raise UserError(f"data: image {path!r} cannot be read ({error}); mend or remove it.") from error


def as_rgb(image: Image.Image, reading: ImageReading) -> Image.Image:
    """The first frame of an open image file as RGB of 8 bits.

    Numbers of 9 to 16 bits are scaled by their range.

    Raises:
        ValueError: if nothing tells the range of its numbers, as for integers of 32 bits and floating point, or they
            are signed.
    """
    if "transparency" in image.info:
        _mend_transparent_colour(image)
    image.load()
    if reading.upright:
        with suppress(*UNREADABLE_IMAGE):  # EXIF data that cannot be read tell no orientation
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = _scaled(image)
    elif SIGNED in getattr(image, "tag_v2", {}).get(SAMPLEFORMAT, ()):  # which Pillow reads as if they were not
        raise ValueError("its numbers are signed; shift them, so that 0 is black")
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, reading.ground), pixels).convert("RGB")


def _mend_transparent_colour(image: Image.Image) -> None:
    """Pillow scales the pixels of a PNG file to 8 bits, but not the colour that its header calls transparent, and of
    16 bits it leaves the lower half out, by which colours differ, too.
    """
    colour, tiles = image.info["transparency"], getattr(image, "tile", [])
    stored_as = tiles[0][3] if tiles else None
    if stored_as in SCALES_OF_GREY:
        image.info["transparency"] = colour * SCALES_OF_GREY[stored_as]
    elif stored_as == "RGB;16B":
        assert isinstance(image, ImageFile.ImageFile) and image.fp is not None
        position = image.fp.tell()
        lower = Image.open(image.fp)
        lower.tile = [(*tile[:3], "RGB;16L") for tile in lower.tile]  # type: ignore[misc]
        lower_halves = np.asarray(lower)
        image.fp.seek(position)
        numbers = 256 * np.asarray(image).astype(np.int64) + lower_halves
        del image.info["transparency"]
        image.putalpha(Image.fromarray(np.where((numbers == colour).all(axis=2), 0, 255).astype(np.uint8)))


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as one of 8, with its transparency."""
    largest = LARGEST_OF_16_BITS
    tags = getattr(image, "tag_v2", {})
    if BITSPERSAMPLE in tags:
        largest = 2 ** max(tags[BITSPERSAMPLE]) - 1
    if not image.mode.startswith("I;16") and (image.mode != "I" or image.format not in ("PNG", "PPM")):  # of 16 bits
        raise ValueError(
            f"nothing tells the range of its numbers, which are of Pillow's mode {image.mode}; scale them to 8 or 16 "
            "bits"
        )
    numbers = np.asarray(image).astype(np.int64)
    grey = (numbers * 255 + largest // 2) // largest
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        grey = 255 - grey
    scaled = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(numbers == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled
