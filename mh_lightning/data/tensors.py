"""Streams over any tensors, given in Python or in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UNREADABLE, UserError, reason_of, require

ENTRIES = ("x_train", "y_train", "x_test", "y_test")
MOST_CLASSES = 10**6
OPTIONAL_ENTRIES = ("domain_train", "domain_test", "x_validation", "y_validation", "domain_validation")


class Tensors(StreamDataModule):
    """Stream of tensors.

    Args:
        x_train: (samples, ...): floating point goes to the backbone as it is; uint8 (samples, height, width) or
            (samples, height, width, 3) are images and get the backbone's transform. Other integers are features, and
            refused in the shape of images, whose range they do not tell.
        y_train: integer classes from 0 to C-1, (samples,).
        x_test: as `x_train`.
        y_test: as `y_train`.
        num_classes: C, at least 1, by default the number of different training labels.
        class_names: of the C classes, by default their numbers.
        domain_train: integer domains from 0, (samples,), for scenarios with domains; then all splits need them.
        domain_test: as `domain_train`.
        x_validation: as `x_train`, if there are validation samples.
        y_validation: as `y_train`.
        domain_validation: as `domain_train`.
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
        class_names: Sequence[str] | None = None,
        domain_train: Tensor | None = None,
        domain_test: Tensor | None = None,
        x_validation: Tensor | None = None,
        y_validation: Tensor | None = None,
        domain_validation: Tensor | None = None,
        **stream_options: Any,
    ) -> None:
        super().__init__(**stream_options)
        optional = (domain_train, domain_test, x_validation, y_validation, domain_validation)
        self._given: dict[str, Tensor] = dict(zip(ENTRIES, (x_train, y_train, x_test, y_test), strict=True))
        self._given |= {
            name: entry for name, entry in zip(OPTIONAL_ENTRIES, optional, strict=True) if entry is not None
        }
        self._given_classes, self._class_names = num_classes, class_names

    def load(self) -> Splits:
        """Check the tensors."""
        splits = _as_splits(self._given, self._given_classes, "data")
        if self._class_names is None:
            return splits
        names = list(self._class_names)
        if len(names) != len(splits.class_names) or len({*names}) < len(names):
            raise UserError(f"data.class_names must be {len(splits.class_names)} different names, got {names}.")
        return splits._replace(class_names=names)


class TensorFile(StreamDataModule):
    """Stream of the tensors of a file: x_train, y_train, x_test, y_test and, if it has them, the optional ones of
    `Tensors`.

    Args:
        path: a .safetensors, .npz or .pt file (a dict of tensors), read without running any code in it.
        num_classes: C, at least 1, by default the number of different training labels.
        stream_options: options of `StreamDataModule`.
    """

    def __init__(self, path: str, num_classes: int | None = None, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.path = path
        self._given_classes = num_classes

    @classmethod
    def brings_validation(cls, options: dict[str, Any]) -> bool:
        """Whether the file has an entry x_validation."""
        path = Path(options["path"]).expanduser()
        return path.is_file() and "x_validation" in _read(path)

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
    require("data.num_classes", num_classes, at_least=1, at_most=MOST_CLASSES)
    splits = ["train", "test"]
    if any(name.endswith("_validation") for name in entries.keys() & set(OPTIONAL_ENTRIES)):
        splits.append("validation")
    with_domains = any(f"domain_{split}" in entries for split in splits)
    needed = [f"{kind}_{split}" for kind in ("x", "y", *(["domain"] if with_domains else [])) for split in splits]
    missing = [name for name in needed if name not in entries]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing)}; validation samples need classes, and domains belong to all splits "
            "or to none."
        )
    entries = {name: _plain(torch.as_tensor(entries[name]), f"{source}: {name}") for name in needed}
    inputs = {split: _inputs(entries[f"x_{split}"], f"{source}: x_{split}") for split in splits}
    kind = _kind(inputs["train"])
    for split in splits:
        if _kind(inputs[split]) != kind:
            raise UserError(
                f"{source}: samples of x_train and x_{split} must have the same shape and be images both or neither, "
                f"got {kind} and {_kind(inputs[split])}."
            )
    labelled = {
        split: Labelled(
            inputs[split],
            _integers(entries, f"y_{split}", split, source),
            _integers(entries, f"domain_{split}", split, source) if with_domains else None,
        )
        for split in splits
    }
    classes = len(np.unique(labelled["train"].labels)) if num_classes is None else num_classes
    names = [str(name) for name in range(classes)]
    return Splits(labelled["train"], labelled["test"], names, labelled.get("validation"))


def _plain(entry: Tensor, name: str) -> Tensor:
    """A tensor without a gradient; sparse and quantized ones, and those without data, are refused."""
    if entry.layout != torch.strided or entry.is_quantized or entry.is_meta:
        raise UserError(f"{name} must be a dense tensor of plain numbers, got {entry.layout} of {entry.dtype}.")
    return entry.detach()


def _inputs(x: Tensor, entry: str) -> Tensor:
    if x.dim() == 0 or x.is_complex():
        raise UserError(f"{entry} must hold real samples in its rows, got shape {tuple(x.shape)} of {x.dtype}.")
    if x.dtype != torch.uint8:
        if x.dim() >= 3 and not x.is_floating_point():
            raise UserError(
                f"{entry} must hold images as uint8, or as floating point that goes to the backbone as it is, got "
                f"shape {tuple(x.shape)} of {x.dtype}; scale and convert it."
            )
        return x.float()
    if x.dim() != 3 and not (x.dim() == 4 and x.shape[3] == 3):
        raise UserError(
            f"{entry}: images of type uint8 must have shape (samples, height, width) or (samples, height, width, 3), "
            f"got {tuple(x.shape)}."
        )
    return x


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape[1:])} of {x.dtype}"


def _integers(entries: dict[str, Tensor], name: str, split: str, source: str) -> NDArray[np.int64]:
    values, samples = entries[name], len(entries[f"x_{split}"])
    integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.dim() != 1 or not integers or len(values) != samples or not samples:
        raise UserError(
            f"{source}: {name} must hold one integer for each of the {samples} samples of x_{split}, "
            f"got shape {tuple(values.shape)} of {values.dtype}."
        )
    return values.numpy().astype(np.int64)
