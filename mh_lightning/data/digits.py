"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, inside the package."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import StreamDataModule


class Digits(StreamDataModule):
    """Stream of scikit-learn's digits: 10 classes; a quarter of each, always the same, is the test set.

    Args:
        stream_options: options of `StreamDataModule`.

    Example:
        >>> digits = Digits(increment=2)
        >>> digits.setup("fit")
        >>> digits.class_groups, digits.num_samples("train", 0), digits.num_samples("test", 0)
        ([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], 269, 91)
    """

    def __init__(self, **stream_options: Any) -> None:
        super().__init__(**stream_options)

    def load(self) -> Splits:
        """Read the digits, scaled to 0...255."""
        bunch = load_digits()
        images = torch.from_numpy(np.round(bunch.images * 255 / 16).astype(np.uint8))
        everything = Labelled(images, bunch.target.astype(np.int64))
        train, test = train_test_split(np.arange(len(images)), test_size=0.25, stratify=bunch.target, random_state=0)
        return Splits(everything.take(train), everything.take(test), [str(name) for name in bunch.target_names])
