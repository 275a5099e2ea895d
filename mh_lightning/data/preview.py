"""What samples look like before any transform, to be shown."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mh_lightning.data.labelled import Labelled, StreamDataset
from mh_lightning.data.perturbations import Perturbation

PIXELS = 84


def small_pictures(samples: Labelled, perturbations: Sequence[Perturbation], seed: Sequence[int]) -> NDArray[np.uint8]:
    """Images (samples, PIXELS, PIXELS, 3), perturbed if they are so in the stream, and scaled to one size."""
    tasks = np.zeros(len(samples.labels), dtype=np.int64)
    dataset = StreamDataset(samples, tasks, _small_picture, perturbations, seed)
    return np.stack([dataset[place][0].numpy() for place in range(len(dataset))])


def _small_picture(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((PIXELS, PIXELS), Image.Resampling.NEAREST)))


def extent_of_points(points: Tensor) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of points (samples, 2) of a plane, with a margin of 5 %.

    Example:
        >>> extent_of_points(torch.tensor([[0.0, 0.0], [20.0, 40.0]]))
        (-1.0, 21.0, -2.0, 42.0)
    """
    low, high = points.amin(dim=0), points.amax(dim=0)
    margin = 0.05 * (high - low).clamp_min(1e-6)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top
