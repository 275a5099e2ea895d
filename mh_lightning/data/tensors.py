"""Streams over any tensors, given in Python or in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splitting import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UNREADABLE, UserError, reason_of

ENTRIES = ("x_train", "y_train", "x_test", "y_test")


class Tensors(StreamDataModule):
    """Stream of tensors.

    Args:
        x_train: (samples, ...): floating point goes to the backbone as it is; uint8 (samples, height, width) or
            (samples, height, width, 3) are images and get the backbone's transform.
        y_train: integer classes from 0 to C-1, (samples,).
        x_test: as `x_train`.
        y_test: as `y_train`.
        num_classes: C, by default the number of different training labels.
        stream_options: options of `StreamDataModule`.

    Example:
        >>> x, y = torch.randn(8, 2), torch.tensor([0, 1, 2, 3] * 2)
        >>> stream = Tensors(x, y, x, y, increment=2)
        >>> stream.setup("fit")
        >>> stream.num_tasks
        2
    """

    def __init__(
        self,
        x_train: Tensor,
        y_train: Tensor,
        x_test: Tensor,
        y_test: Tensor,
        num_classes: int | None = None,
        **stream_options: Any,
    ) -> None:
        super().__init__(**stream_options)
        self._given: dict[str, Tensor] = dict(zip(ENTRIES, (x_train, y_train, x_test, y_test), strict=True))
        self._given_classes = num_classes

    def load(self) -> Splits:
        """Check the tensors."""
        return _as_splits(self._given, self._given_classes, "data")


class TensorFile(StreamDataModule):
    """Stream of the tensors x_train, y_train, x_test and y_test of a file; see `Tensors`.

    Args:
        path: a .safetensors, .npz or .pt file (a dict of tensors), read without running any code in it.
        num_classes: C, by default the number of different training labels.
        stream_options: options of `StreamDataModule`.
    """

    def __init__(self, path: str, num_classes: int | None = None, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.path = path
        self._given_classes = num_classes

    def load(self) -> Splits:
        """Read the file."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"data.path={self.path!r} is no file; give a .safetensors, .npz or .pt file.")
        try:
            entries = _read(path)
        except UNREADABLE as error:
            raise UserError(
                f"data.path={self.path!r} cannot be read ({reason_of(error)}): damaged, or not only tensors."
            ) from error
        missing = [name for name in ENTRIES if name not in entries]
        if missing:
            raise UserError(
                f"data.path={self.path!r} lacks the entries {', '.join(missing)}; it has "
                f"{', '.join(sorted(map(str, entries))) or 'none'}."
            )
        return _as_splits(entries, self._given_classes, f"data.path={self.path!r}")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    entries = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(entries, dict) or not all(isinstance(entry, Tensor) for entry in entries.values()):
        raise ValueError("no dict of tensors")
    return entries


def _as_splits(entries: dict[str, Tensor], num_classes: int | None, source: str) -> Splits:
    def labelled(split: str) -> Labelled:
        x, y = torch.as_tensor(entries[f"x_{split}"]), torch.as_tensor(entries[f"y_{split}"])
        if x.dim() == 0 or x.is_complex():
            raise UserError(
                f"{source}: x_{split} must hold real samples in its rows, got shape {tuple(x.shape)} of {x.dtype}."
            )
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.dim() != 1 or not integers or len(x) != len(y) or not len(y):
            raise UserError(
                f"{source}: y_{split} must hold one integer for each of the {len(x)} samples of x_{split}, "
                f"got shape {tuple(y.shape)} of {y.dtype}."
            )
        if x.dtype != torch.uint8:
            x = x.float()
        elif x.dim() != 3 and not (x.dim() == 4 and x.shape[3] == 3):
            raise UserError(
                f"{source}: images of type uint8 must have shape (samples, height, width) or (samples, "
                f"height, width, 3), got {tuple(x.shape)}."
            )
        return Labelled(x, y.numpy().astype(np.int64))

    if num_classes is not None and num_classes < 1:
        raise UserError(f"data.num_classes must be at least 1, got {num_classes}.")
    train, test = labelled("train"), labelled("test")
    if train.inputs.shape[1:] != test.inputs.shape[1:]:  # type: ignore[union-attr]
        raise UserError(
            f"{source}: samples of x_train and x_test must have the same shape, got "
            f"{tuple(entries['x_train'].shape[1:])} and {tuple(entries['x_test'].shape[1:])}."
        )
    classes: NDArray[np.int64] = np.unique(train.labels)
    return Splits(train, test, [str(name) for name in range(len(classes) if num_classes is None else num_classes)])
