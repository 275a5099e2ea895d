"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels, 10 classes (Xiao, Rasul, Vollgraf 2017)."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UNREADABLE, UserError, reason_of

FILES = ("train", "t10k")
# the fourth byte of an idx file says how many dimensions follow; the third, 8, that values are unsigned bytes
UNSIGNED_BYTES = 8


class FashionMNIST(StreamDataModule):
    """Stream of Fashion-MNIST, from idx files as published, compressed or not.

    Args:
        root: folder of the four idx files, or one above in torchvision's layout (``root/FashionMNIST/raw``). Debian's
            package ``dataset-fashion-mnist`` puts them into /usr/share/datasets/fashion-mnist.
        download: fetch the files with torchvision if they are not there.
        stream_options: options of `StreamDataModule`.
    """

    def __init__(self, root: str = "data", download: bool = False, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.root, self.download = root, download

    def prepare_data(self) -> None:
        """Download, once a machine, when asked to."""
        if not self.download or self._folder() is not None:
            return
        try:
            torchvision.datasets.FashionMNIST(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.download=true: Fashion-MNIST could not be fetched to {self.root!r} ({error})."
            ) from error

    def load(self) -> Splits:
        """Read the idx files."""
        folder = self._folder()
        if folder is None:
            raise UserError(
                f"data.root={self.root!r} holds no Fashion-MNIST idx files; give their folder, or download=true."
            )
        train, test = (
            Labelled(
                torch.from_numpy(_read_idx(folder, f"{name}-images-idx3-ubyte", 3)),
                _read_idx(folder, f"{name}-labels-idx1-ubyte", 1).astype(np.int64),
            )
            for name in FILES
        )
        for name, part in zip(FILES, (train, test), strict=True):
            if len(part.inputs) != len(part.labels):
                raise UserError(
                    f"data.root={str(folder)!r}: {name} holds {len(part.inputs)} images, but {len(part.labels)} "
                    "labels; fetch the files again."
                )
        return Splits(train, test, torchvision.datasets.FashionMNIST.classes)

    def _folder(self) -> Path | None:
        root = Path(self.root).expanduser()
        for folder in (root, root / "raw", root / "FashionMNIST" / "raw"):
            if _file(folder, "train-images-idx3-ubyte") is not None:
                return folder
        return None


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    path = _file(folder, name)
    if path is None:
        raise UserError(f"data.root={str(folder)!r} lacks {name} (or {name}.gz).")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = np.frombuffer(content, ">i4", dimensions + 1)
        if header[0] != UNSIGNED_BYTES * 256 + dimensions:
            raise ValueError("wrong header")
        return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:]).copy()
    except UNREADABLE as error:
        raise UserError(f"data.root: {str(path)!r} is a damaged idx file ({reason_of(error)}).") from error
