"""What a model is asked about, as its inputs: paths, images, arrays, tensors or features."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.data.images import as_rgb, read_image
from mh_lightning.data.labelled import stacked
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.errors import UserError

SUFFIXES = tuple(sorted(Image.registered_extensions()))
CHANNELS = (1, 3, 4)


def as_sequence(inputs: Any) -> Sequence[Any] | Tensor:
    """What was given as a sequence of images, or, of inputs and features, as a tensor.

    Raises:
        UserError: if it is nothing that images or features can be.
    """
    if isinstance(inputs, str | Path | Image.Image):
        return [inputs]
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "USO":
        inputs = inputs.tolist()
    if isinstance(inputs, np.ndarray):
        inputs = inputs.astype(inputs.dtype.newbyteorder("="), copy=False)
        inputs = torch.from_numpy(np.ascontiguousarray(inputs))
    if isinstance(inputs, Tensor):
        if inputs.is_floating_point():
            if inputs.dim() < 2:
                raise UserError(f"predict: inputs are a batch, (b, ...), got the shape {tuple(inputs.shape)}.")
            return inputs
        if inputs.dtype != torch.uint8 or inputs.dim() not in (2, 3, 4):
            raise UserError(
                f"predict: images in an array are uint8, (b, height, width), or (b, height, width, 3), got "
                f"{inputs.dtype} of shape {tuple(inputs.shape)}; inputs and features are floating-point numbers."
            )
        one = inputs.dim() == 2 or (inputs.dim() == 3 and inputs.shape[2] in CHANNELS)
        return list(inputs.unsqueeze(0) if one else inputs)
    if isinstance(inputs, Iterable):
        entries = list(inputs)
        if entries and all(isinstance(entry, Tensor) and entry.is_floating_point() for entry in entries):
            return stacked(entries)
        return entries
    raise UserError(f"predict: paths, images, arrays or tensors are needed, got {type(inputs).__name__}.")


def as_image(entry: Any, learnt: LearntStream) -> Image.Image:
    """One entry as an RGB image.

    Raises:
        UserError: if it cannot be read.
    """
    if isinstance(entry, str | Path):
        return read_image(str(entry), learnt.reading)
    if isinstance(entry, Image.Image):
        return as_rgb(entry.copy(), learnt.reading)
    pixels = entry.numpy() if isinstance(entry, Tensor) else entry
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        kind = f"an array of {pixels.dtype}" if isinstance(pixels, np.ndarray) else f"a {type(entry).__name__}"
        raise UserError(f"predict: an image is a path, a PIL image or an array of uint8, got {kind}.")
    if pixels.ndim == 3 and pixels.shape[0] in CHANNELS and pixels.shape[2] not in CHANNELS:
        pixels = np.moveaxis(pixels, 0, 2)
    try:
        return as_rgb(Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels), learnt.reading)
    except (TypeError, ValueError) as error:
        raise UserError(f"predict: an array of shape {pixels.shape} is no image ({error}).") from error


def as_input(entry: Any, backbone: Backbone, learnt: LearntStream) -> Tensor:
    """An image as the backbone takes it, (channels, height, width).

    Raises:
        UserError: if it cannot be read.
    """
    transform = learnt.transform(backbone)
    image = as_image(entry, learnt)
    if transform is None:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return transform(image)


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, in the order of their names; those that begin with a dot are left out.

    Raises:
        UserError: if there are none.
    """
    if not folder.is_dir():
        raise UserError(f"images={str(folder)!r} is no folder; give one with image files.")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(f"images={str(folder)!r} holds no image files, such as .jpg or .png.")
    return found
