"""Tiny images and archives, to write data sets in their official layouts."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def picture(shade: int = 0) -> bytes:
    """A JPEG of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 100, 200)).save(file, "JPEG")
    return file.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files under `folder`, by path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """A tar archive; `mode` "w:gz" compresses it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """A zip archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def packed(name: str, files: Mapping[str, bytes]) -> bytes:
    """An archive of the kind that its name tells."""
    return zip_of(files) if name.endswith(".zip") else tar_of(files, "w:gz" if name.endswith("gz") else "w")


def images_of(parts: Mapping[str, int], folder: str = "") -> dict[str, bytes]:
    """So many images in each of the folders, by path."""
    return {
        f"{folder}{name}/{index}.jpg": picture(40 * place + index)
        for place, (name, count) in enumerate(parts.items())
        for index in range(count)
    }
