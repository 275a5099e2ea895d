"""Labelled samples: what every data set is read into, and what the loaders draw from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mh_lightning.errors import UserError


class Labelled(NamedTuple):
    """Samples with their classes.

    Inputs are paths of images, a uint8 tensor of images (samples, height, width) or (samples, height, width, 3), or a
    floating-point tensor (samples, ...) that goes to the backbone as it is.
    """

    inputs: Sequence[str] | Tensor
    labels: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "Labelled":
        """The samples at `indices`."""
        if isinstance(self.inputs, Tensor):
            return Labelled(self.inputs[torch.from_numpy(indices)], self.labels[indices])
        return Labelled([self.inputs[index] for index in indices], self.labels[indices])


class StreamDataset(Dataset[tuple[Tensor, int, int]]):
    """Items (x, class, task).

    Args:
        samples: where the items come from.
        tasks: index of the task of each sample, (samples,).
        transform: applied to images; None passes tensors on.
    """

    def __init__(
        self, samples: Labelled, tasks: NDArray[np.int64], transform: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.samples, self.tasks, self.transform = samples, tasks, transform

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self._input(index), int(self.samples.labels[index]), int(self.tasks[index])

    def _input(self, index: int) -> Tensor:
        entry = self.samples.inputs[index]
        if isinstance(entry, Tensor) and entry.is_floating_point():
            return entry
        image = Image.fromarray(entry.numpy()).convert("RGB") if isinstance(entry, Tensor) else read_image(entry)
        if self.transform is not None:
            return self.transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: names the file if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"data: image {path!r} cannot be read ({error}); mend or remove it.") from error


def check_labels(labels: NDArray[np.int64], num_classes: int, split: str) -> None:
    """Refuse labels outside 0 to C-1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"data: {split} labels must lie in 0 to {num_classes - 1} (C-1, with {num_classes} classes), "
            f"got {int(wrong[0])}."
        )


def check_finite(inputs: Sequence[str] | Tensor, split: str) -> None:
    """Refuse NaN and infinite values in tensors."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        broken = (~inputs.reshape(len(inputs), -1).isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise UserError(
                f"data: {split} inputs hold NaN or infinite features, in sample {int(broken[0])} first; "
                "remove or mend these samples."
            )
