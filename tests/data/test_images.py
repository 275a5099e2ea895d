"""Image files as RGB, on files written here."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mh_lightning.data.features.fingerprint import image_digests
from mh_lightning.data.images import ImageReading, as_rgb, colour_of, read_image
from mh_lightning.data.labelled import Labelled, StreamDataset
from mh_lightning.data.splits import concatenate, one_domain_a_perturbation
from tests.data.refusal import refused

AS_STORED = ImageReading()
RAMP = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
RAMP_OF_8_BITS = np.round(RAMP / 257)


def read(path: Path, reading: ImageReading = AS_STORED) -> NDArray[np.uint8]:
    image = read_image(str(path), reading)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(depth: int, colour_type: int, rows: list[bytes], width: int, transparent: bytes) -> bytes:
    """A PNG of kinds that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "compressed.tif", "big_endian.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "big_endian.tif":
        Image.fromarray(RAMP).convert("I").convert("I;16B").save(path)
    else:
        Image.fromarray(RAMP).save(path, **({"compression": "tiff_lzw"} if "compressed" in name else {}))
    grey = read(path)
    assert (grey == RAMP_OF_8_BITS[..., None]).all()
    assert len(np.unique(grey)) == 256


def test_white_is_zero_and_12_bits(tmp_path: Path) -> None:
    """Tags of TIFF files tell both."""
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP).save(path, tiffinfo={262: 0})
    assert (read(path) == 255 - RAMP_OF_8_BITS[..., None]).all()
    twelve = np.array([[0, 4095, 2048, 1023]])
    packed = bytes.fromhex("000fff8003ff")
    entries = [(256, 4, 4), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 4, 1), (279, 4, len(packed))]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(entries)) + directory + bytes(4)
    )
    assert read(path)[..., 0].tolist() == np.round(twelve * 255 / 4095).tolist()


@pytest.mark.parametrize("numbers", [RAMP.astype(np.int32) * 1000, RAMP.astype(np.float32), RAMP / np.float32(65535)])
def test_numbers_of_no_known_range_are_refused(numbers: NDArray[np.generic], tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(numbers).save(path)
    refused(lambda: read(path), f"'{path}'", "cannot be read", "range", "mode", "8 or 16 bits")


def test_signed_numbers_are_refused(tmp_path: Path) -> None:
    """Pillow reads -128 as 128."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(path, tiffinfo={339: 2})
    refused(lambda: read(path), f"'{path}'", "signed")


def test_floating_point_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(b"Pf\n4 2\n-1.0\n" + np.linspace(0, 1, 8).astype("<f4").tobytes())
    refused(lambda: read(path), f"'{path}'", "range", "mode F")


def test_other_kinds_keep_their_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    image = Image.fromarray(colours)
    for reading in (AS_STORED, ImageReading((9, 9, 9), upright=True)):
        for name, kind in (("a.png", image), ("a.ppm", image), ("a.bmp", image), ("p.png", image.quantize(64)),
                           ("l.png", image.convert("L")), ("c.tif", image.convert("CMYK")),
                           ("1.png", image.convert("1")), ("opaque.png", image.convert("RGBA"))):  # fmt: skip
            kind.save(tmp_path / name)
            assert (read(tmp_path / name, reading) == np.asarray(kind.convert("RGB"))).all()


WHITE, GREEN = (255, 255, 255), (0, 128, 0)


@pytest.mark.parametrize("ground", [WHITE, GREEN])
def test_transparent_pixels_lie_on_the_ground(ground: tuple[int, int, int], tmp_path: Path) -> None:
    """A black stroke on transparent black, whatever the file calls transparent."""
    stroke = np.zeros((4, 4), dtype=bool)
    stroke[1] = True
    alpha = Image.fromarray(np.where(stroke, 255, 0).astype(np.uint8))
    black = Image.new("L", (4, 4))
    expected = np.where(stroke[..., None], 0, ground)

    index = Image.fromarray(stroke.astype(np.uint8))
    index.putpalette([0, 0, 0, 0, 0, 0])
    kinds = {
        "rgba.png": Image.merge("RGBA", (black, black, black, alpha)),
        "rgba.webp": Image.merge("RGBA", (black, black, black, alpha)),
        "rgba.tif": Image.merge("RGBA", (black, black, black, alpha)),
        "la.png": Image.merge("LA", (black, alpha)),
        "la.tif": Image.merge("LA", (black, alpha)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
        assert (read(tmp_path / name, ImageReading(ground)) == expected).all(), name
    for name, transparent in (("one.png", 0), ("table.png", bytes([0, 255])), ("half.png", bytes([0, 128]))):
        index.save(tmp_path / name, transparency=transparent)
        pixels = read(tmp_path / name, ImageReading(ground))
        if name == "half.png":
            assert (pixels[0] == ground).all() and np.allclose(pixels[1], np.array(ground) / 2, atol=1)
        else:
            assert (pixels == expected).all(), name


def test_half_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 100, 0, 51)).save(tmp_path / "a.png")
    assert np.allclose(read(tmp_path / "a.png"), 0.2 * np.array([200, 100, 0]) + 0.8 * 255, atol=1)
    for mode in ("La", "RGBa"):  # as some TIFF files are
        grey = Image.new(mode[:-1] + "A", (1, 1), (100, 51) if mode == "La" else (100, 100, 100, 51)).convert(mode)
        assert np.allclose(np.asarray(as_rgb(grey, AS_STORED)), 0.2 * 100 + 0.8 * 255, atol=2)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "transparent"),
    [
        (1, 0, b"\x40", struct.pack(">H", 1)),
        (2, 0, b"\x30", struct.pack(">H", 3)),
        (4, 0, b"\x0f", struct.pack(">H", 15)),
        (8, 0, b"\x00\xff", struct.pack(">H", 255)),
        (16, 0, struct.pack(">2H", 0, 65535), struct.pack(">H", 65535)),
        (8, 2, bytes([0, 0, 0, 255, 255, 255]), struct.pack(">3H", 255, 255, 255)),
        (16, 2, struct.pack(">6H", 0, 0, 0, 65535, 65535, 65535), struct.pack(">3H", *[65535] * 3)),
        (16, 2, struct.pack(">6H", 0, 0, 0, 258, 515, 777), struct.pack(">3H", 258, 515, 777)),
    ],
)
def test_colour_that_a_png_calls_transparent(
    depth: int, colour_type: int, row: bytes, transparent: bytes, tmp_path: Path
) -> None:
    """Two pixels: black, and the one that is transparent."""
    path = tmp_path / "a.png"
    path.write_bytes(png(depth, colour_type, [row], 2, transparent))
    assert read(path, ImageReading(GREEN)).tolist() == [[[0, 0, 0], list(GREEN)]]


def test_colours_that_differ_in_their_lower_half_are_not_transparent_too(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    colours = [(257, 257, 257), (258, 258, 258), (257, 257, 511), (513, 257, 257)]
    path.write_bytes(png(16, 2, [struct.pack(">3H", *one) for one in colours], 1, struct.pack(">3H", 257, 257, 257)))
    assert read(path, ImageReading(GREEN))[:, 0].tolist() == [list(GREEN), [1, 1, 1], [1, 1, 1], [2, 1, 1]]


def write_photograph(path: Path, orientation: int) -> None:
    """40 high and 60 wide, with one bright corner."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


# where the bright corner is when the picture is upright: rows and columns from the end if negative
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    write_photograph(path, orientation)
    upright = read(path, ImageReading(upright=True))
    assert upright.shape == ((60, 40, 3) if orientation >= 5 else (40, 60, 3))
    bright = {corner for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if upright[corner].min() > 200}
    assert bright == {CORNERS[orientation]}
    if suffix != "tif":  # which Pillow always turns
        assert read(path).shape == (40, 60, 3) and read(path)[0, 0].min() > 200


def test_damaged_exif_data_turn_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*", b"Exif\0\0"):
        Image.new("RGB", (60, 40), (10, 20, 30)).save(path, exif=exif)
        assert read(path, ImageReading(upright=True)).shape == (40, 60, 3)


def test_colours_of_grounds() -> None:
    assert colour_of("white", "ground") == WHITE and colour_of("rgb(0, 128, 0)", "ground") == GREEN
    for text in ("whitish", "#12", "#ffffff00", "rgb(300, 0, 0)", "", "1" * 200):
        refused(lambda text=text: colour_of(text, "ground"), "data.ground must be an opaque colour", repr(text))


def test_kept_features_depend_on_how_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (3, 2)).save(path)
    readings = [AS_STORED, ImageReading(GREEN), ImageReading(upright=True)]
    parts = [Labelled([str(path)], np.zeros(1, dtype=np.int64), None, reading) for reading in readings]
    assert len({image_digests(part)[0] for part in parts}) == 3
    assert len({image_digests(one_domain_a_perturbation(part, 2))[1] for part in parts}) == 3
    assert image_digests(parts[1]) == image_digests(parts[1].take(np.array([0])))


def test_reading_goes_along(tmp_path: Path) -> None:
    """Through all that is done to samples, to the tensor."""
    path = tmp_path / "a.png"
    Image.new("RGBA", (3, 2)).save(path)
    samples = Labelled([str(path)] * 2, np.array([0, 1]), None, ImageReading(GREEN))
    for part in (samples.take(np.array([1])), concatenate([samples, samples]), one_domain_a_perturbation(samples, 2)):
        x = StreamDataset(part, np.zeros(len(part.labels), dtype=np.int64)).input(0)
        assert torch.equal((x * 255).round()[:, 0, 0], torch.tensor(GREEN).float())
