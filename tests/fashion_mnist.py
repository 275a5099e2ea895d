"""A tiny Fashion-MNIST."""

from pathlib import Path

import numpy as np


def write_fashion_mnist(root: Path) -> None:
    """The four idx files, with 8 training and 4 test images of each class."""
    generator = np.random.default_rng(0)
    for name, samples in (("train", 80), ("t10k", 40)):
        images = generator.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = np.arange(samples, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([8 * 256 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (root / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
