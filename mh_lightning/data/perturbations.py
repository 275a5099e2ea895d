"""Perturbations of images: each makes a domain of its own out of a data set."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import UserError

Pixels = NDArray[np.uint8]


class Perturbation(ABC):
    """Changes images. Subclasses define `__call__`."""

    @abstractmethod
    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The perturbed image.

        Args:
            image: (height, width, 3), not to be changed.
            generator: what to draw from.
        """


class Unperturbed(Perturbation):
    """Images as they are."""

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The image."""
        return image


class GaussianNoise(Perturbation):
    r"""Adds :math:`\mathrm{factor} \cdot \epsilon`, with :math:`\epsilon \sim N(0, \sigma^2)` for each number of an
    image in [0, 1], and clips.

    Args:
        factor: at least 0.
        sigma: at least 0.

    Raises:
        UserError: on a negative argument.

    Example:
        >>> grey = np.full((1, 2, 3), 128, dtype=np.uint8)
        >>> bool((GaussianNoise(0.25, sigma=0.1)(grey, np.random.default_rng(0)) != grey).any())
        True
    """

    def __init__(self, factor: float, sigma: float) -> None:
        for name, value in (("factor", factor), ("sigma", sigma)):
            if not 0 <= value < np.inf:
                raise UserError(f"GaussianNoise: {name} must not be negative, got {value}.")
        self.factor, self.sigma = factor, sigma

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The image with noise."""
        noise = generator.normal(scale=self.sigma, size=image.shape)
        noisy: Pixels = (np.clip(image / 255 + self.factor * noise, 0, 1) * 255).round().astype(np.uint8)
        return noisy


class Occlusion(Perturbation):
    """Covers a square at a random place with white.

    Args:
        fraction: side of the square, as a part of the image's shorter side, in [0, 1].

    Raises:
        UserError: on a fraction outside [0, 1].

    Example:
        >>> black = np.zeros((4, 4, 3), dtype=np.uint8)
        >>> int((Occlusion(0.5)(black, np.random.default_rng(0)) == 255).sum())
        12
    """

    def __init__(self, fraction: float) -> None:
        if not 0 <= fraction <= 1:
            raise UserError(f"Occlusion: fraction must lie in [0, 1], got {fraction}.")
        self.fraction = fraction

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The image with a white square."""
        height, width = image.shape[:2]
        side = round(self.fraction * min(height, width))
        top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
        occluded = image.copy()
        occluded[top : top + side, left : left + side] = 255
        return occluded
