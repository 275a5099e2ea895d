"""Writes scikit-learn's digits as image files, to try the commands on: `python examples/digit_images.py images`.

images/old and images/new are streams of the classes zero to six and seven to nine, each with train/<class>/ and
test/<class>/; images/photographs has twelve files more, without labels.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOWN = 12


def write(folder: Path) -> None:
    """Write all digits below a folder: a fifth for tests, the last twelve without labels."""
    digits = load_digits()
    pictures = (digits.images * 255 / 16).astype(np.uint8)
    last = len(pictures) - SHOWN
    for place, (pixels, label) in enumerate(zip(pictures, digits.target, strict=True)):
        part = f"{'old' if label < 7 else 'new'}/{'test' if place % 5 == 0 else 'train'}/{NAMES[label]}"
        path = folder / (part if place < last else "photographs") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "images"))
