"""The two-dimensional streams MODES and MOONS: four classes, each of which changes place in a second domain.

Source: the streams "bi-modals" and "bi-moons" of the code published with Tiezzi et al., CoLLAs 2024, drawn here by
scikit-learn from the published numbers.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_blobs, make_moons

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splits import PUBLISHED_SHUFFLE, Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.errors import UserError

LAST_SEED = 2**32 - 1  # that NumPy takes

Points = NDArray[np.float64]


class Modes(StreamDataModule):
    """MODES: in each domain, each class is one Gaussian cloud.

    Twice `num_samples` points are drawn. Every other one is for training, of the rest every other one for validation
    and for test. The default numbers are the published ones.

    Args:
        num_samples: training samples; half as many are validation samples, and as many test samples.
        class_ratios: part of the samples that each class gets; the last one gets what is left.
        centres: (domains, classes, 2).
        spreads: standard deviations, (domains, classes).
        seeds: of each cloud, (domains, classes).
        scale: scale both coordinates to [-1, 1].
        stream_options: options of `StreamDataModule`.

    Example:
        >>> modes = Modes(scenario="CDI")
        >>> modes.setup("fit")
        >>> [modes.num_samples("train", task) for task in range(modes.num_tasks)]
        [100, 200, 50, 150, 100, 200, 50, 150]
    """

    def __init__(
        self,
        num_samples: int = 1000,
        class_ratios: list[float] = [0.2, 0.4, 0.1, 0.3],  # noqa: B006  # shown by --help, never changed
        centres: list[list[list[float]]] = [  # noqa: B006
            [[0.25, 0.25], [0.6, 0.65], [0.15, 0.5], [0.85, 0.3]],
            [[0.2, 0.75], [1.0, 0.1], [1.15, 0.75], [0.3, 0.5]],
        ],
        spreads: list[list[float]] = [[0.02, 0.08, 0.015, 0.03], [0.04, 0.02, 0.06, 0.015]],  # noqa: B006
        seeds: list[list[int]] = [[1234, 5678, 9101112, 13141516], [1, 5, 9, 13]],  # noqa: B006
        scale: bool = True,
        **stream_options: Any,
    ) -> None:
        super().__init__(**stream_options)
        self.num_samples_to_draw, self.class_ratios, self.scale = num_samples, class_ratios, scale
        self.centres, self.spreads, self.seeds = centres, spreads, seeds
        domains, classes = max(len(centres), 1), len(class_ratios)
        _check_ratios(class_ratios, num_samples, domains)
        _check("centres", centres, (domains, classes, 2))
        _check("spreads", spreads, (domains, classes), low=0)
        _check("seeds", seeds, (domains, classes), low=0, high=LAST_SEED)

    @classmethod
    def brings_validation(cls, options: dict[str, Any]) -> bool:
        """It does."""
        return True

    def load(self) -> Splits:
        """Draw the clouds."""

        def draw(label: int, domain: int, count: int) -> Points:
            points, _ = make_blobs(
                count,
                centers=np.array([self.centres[domain][label]]),
                cluster_std=self.spreads[domain][label],
                shuffle=False,
                random_state=self.seeds[domain][label],
            )
            return np.asarray(points)

        parts = []
        for label, counts in enumerate(_counts(self.class_ratios, self.num_samples_to_draw, len(self.centres))):
            parts += [(draw(label, domain, count), label, domain) for domain, count in enumerate(counts)]
        return _splits(parts, len(self.class_ratios), self.scale)


class Moons(StreamDataModule):
    """MOONS: in each domain, each pair of classes is a pair of interleaved half circles.

    Samples are drawn and split as in `Modes`. The default numbers are the published ones.

    Args:
        num_samples: training samples; half as many are validation samples, and as many test samples.
        class_ratios: part of the samples that each class gets, an even number of classes; the last one gets what is
            left.
        offsets: where the pairs are moved to, (domains, pairs, 2).
        noise: standard deviation of the Gaussian noise, (domains, pairs).
        seeds: of each pair, (domains, pairs).
        scale: scale both coordinates to [-1, 1].
        stream_options: options of `StreamDataModule`.

    Example:
        >>> moons = Moons(scenario="CI")
        >>> moons.setup("fit")
        >>> [moons.num_samples("train", task) for task in range(moons.num_tasks)]
        [400, 100, 300, 200]
    """

    def __init__(
        self,
        num_samples: int = 1000,
        class_ratios: list[float] = [0.4, 0.1, 0.3, 0.2],  # noqa: B006  # shown by --help, never changed
        offsets: list[list[list[float]]] = [[[0.0, 0.0], [-3.0, 1.0]], [[2.0, 1.0], [3.0, -1.0]]],  # noqa: B006
        noise: list[list[float]] = [[0.08, 0.06], [0.04, 0.03]],  # noqa: B006
        seeds: list[list[int]] = [[1234, 5678], [1, 5]],  # noqa: B006
        scale: bool = True,
        **stream_options: Any,
    ) -> None:
        super().__init__(**stream_options)
        self.num_samples_to_draw, self.class_ratios, self.scale = num_samples, class_ratios, scale
        self.offsets, self.noise, self.seeds = offsets, noise, seeds
        if len(class_ratios) % 2:
            raise UserError(f"data.class_ratios must hold an even number of classes, got {len(class_ratios)}.")
        domains, pairs = max(len(offsets), 1), len(class_ratios) // 2
        _check_ratios(class_ratios, num_samples, domains)
        _check("offsets", offsets, (domains, pairs, 2))
        _check("noise", noise, (domains, pairs), low=0)
        _check("seeds", seeds, (domains, pairs), low=0, high=LAST_SEED)

    @classmethod
    def brings_validation(cls, options: dict[str, Any]) -> bool:
        """It does."""
        return True

    def load(self) -> Splits:
        """Draw the moons."""
        counts = _counts(self.class_ratios, self.num_samples_to_draw, len(self.offsets))
        parts = []
        for pair in range(len(counts) // 2):
            for domain in range(len(self.offsets)):
                sizes = (counts[2 * pair][domain], counts[2 * pair + 1][domain])
                points, half = make_moons(
                    sizes, shuffle=False, noise=self.noise[domain][pair], random_state=self.seeds[domain][pair]
                )
                points = np.asarray(points) + np.array(self.offsets[domain][pair])
                parts += [(points[half == one], 2 * pair + one, domain) for one in (0, 1)]
        return _splits(parts, len(counts), self.scale)


def _counts(ratios: list[float], num_samples: int, domains: int) -> list[list[int]]:
    """Samples of each class in each domain; the last class and the last domain get what is left."""
    totals = [int(2 * num_samples * ratio) for ratio in ratios[:-1]]
    totals.append(2 * num_samples - sum(totals))
    return [[total // domains] * (domains - 1) + [total - total // domains * (domains - 1)] for total in totals]


def _splits(parts: list[tuple[Points, int, int]], classes: int, scale: bool) -> Splits:
    points = np.concatenate([part for part, _, _ in parts])
    if scale:
        points = points - points.min(axis=0)
        points = 2.0 * (points / points.max(axis=0)) - 1.0
    labels = np.concatenate([np.full(len(part), label, dtype=np.int64) for part, label, _ in parts])
    domains = np.concatenate([np.full(len(part), domain, dtype=np.int64) for part, _, domain in parts])

    def split(places: slice) -> Labelled:
        order = np.random.RandomState(PUBLISHED_SHUFFLE).permutation(len(labels[places]))
        inputs = torch.from_numpy(points[places][order]).float()
        return Labelled(inputs, labels[places][order], domains[places][order])

    names = [str(label) for label in range(classes)]
    return Splits(split(slice(0, None, 2)), split(slice(3, None, 4)), names, split(slice(1, None, 4)))


def _check_ratios(ratios: list[float], num_samples: int, domains: int) -> None:
    if not ratios or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise UserError(f"data.class_ratios must be positive and sum to 1, got {ratios}.")
    if num_samples < 1 or min(min(counts) for counts in _counts(ratios, num_samples, domains)) < 4:
        raise UserError(
            f"data.num_samples={num_samples} is too few for each of {len(ratios)} classes to have samples in each of "
            f"{domains} domains and in each split; take more."
        )


def _check(option: str, values: Any, shape: tuple[int, ...], low: float = -np.inf, high: float = np.inf) -> None:
    found: object
    try:
        numbers = np.array(values, dtype=float)
        found = numbers.shape
    except ValueError:
        found = "uneven lists"
    if found != shape:
        raise UserError(f"data.{option} must be a list of shape {shape} (domains first), got {found}.")
    if not (np.isfinite(numbers) & (numbers >= low) & (numbers <= high)).all():
        raise UserError(f"data.{option} must hold finite numbers in [{low}, {high}], got {values}.")
