"""Perturbations of images: each makes a domain of its own out of a data set."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import require

Pixels = NDArray[np.uint8]


class Perturbation(ABC):
    """Changes images. Subclasses define `__call__`, and keep their settings in attributes."""

    @abstractmethod
    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The perturbed image.

        Args:
            image: (height, width, 3), not to be changed.
            generator: what to draw from.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


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
        UserError: on an argument that is negative or not finite.

    Example:
        >>> grey = np.full((1, 2, 3), 128, dtype=np.uint8)
        >>> bool((GaussianNoise(0.25, sigma=0.1)(grey, np.random.default_rng(0)) != grey).any())
        True
    """

    def __init__(self, factor: float, sigma: float) -> None:
        for name, value in (("factor", factor), ("sigma", sigma)):
            require(f"data.perturbations: GaussianNoise's {name}", value, at_least=0, below=np.inf)
        self.factor, self.sigma = factor, sigma

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The image with noise."""
        noise = generator.normal(scale=self.sigma, size=image.shape)
        noisy: Pixels = (np.clip(image / 255 + self.factor * noise, 0, 1) * 255).round().astype(np.uint8)
        return noisy


class Occlusion(Perturbation):
    """Covers a rectangle of the image's proportions, at a random place, with white.

    Args:
        fraction: of the image's area, in [0, 1], up to rounding to whole pixels.

    Raises:
        UserError: on a fraction outside [0, 1].

    Example:
        >>> black = np.zeros((4, 8, 3), dtype=np.uint8)
        >>> float((Occlusion(0.25)(black, np.random.default_rng(0)) == 255).mean())
        0.25
    """

    def __init__(self, fraction: float) -> None:
        require("data.perturbations: Occlusion's fraction", fraction, at_least=0, at_most=1)
        self.fraction = fraction

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """The image with a white rectangle."""
        covered = [round(side * self.fraction**0.5) for side in image.shape[:2]]
        top, left = (generator.integers(side - part + 1) for side, part in zip(image.shape[:2], covered, strict=True))
        occluded = image.copy()
        occluded[top : top + covered[0], left : left + covered[1]] = 255
        return occluded
