"""A data set: a stream with a `load` that gives training and test samples; all options of streams come with it."""

from typing import Any

import numpy as np
import torch

from mh_lightning.data import Labelled, Splits, StreamDataModule

ANGLES = 6


class Stripes(StreamDataModule):
    def __init__(self, size: int = 12, samples: int = 20, **stream_options: Any) -> None:
        super().__init__(**stream_options)
        self.size, self.samples = size, samples

    def load(self) -> Splits:
        names = [f"{180 * angle // ANGLES} degrees" for angle in range(ANGLES)]
        return Splits(self._draw(0), self._draw(1), names)

    def _draw(self, seed: int) -> Labelled:
        """Grey stripes at one of six angles and a random phase: images (samples, size, size) of type uint8."""
        labels = np.repeat(np.arange(ANGLES), self.samples)
        phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, len(labels))[:, None, None]
        y, x = np.mgrid[: self.size, : self.size]
        angles = np.pi * labels[:, None, None] / ANGLES
        waves = np.sin(1.5 * (x * np.cos(angles) + y * np.sin(angles)) + phases)
        return Labelled(torch.from_numpy((127.5 + 127.5 * waves).astype(np.uint8)), labels)
