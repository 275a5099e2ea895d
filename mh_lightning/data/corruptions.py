"""Training samples that are spoilt on purpose: classes of few samples, and wrong labels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mh_lightning.errors import UserError


def long_tailed(labels: NDArray[np.int64], imbalance_ratio: float, generator: np.random.Generator) -> NDArray[np.int64]:
    r"""Places of the samples that are left if the class of rank r, in a random order of C classes, keeps
    :math:`\rho^{-r / (C - 1)}` of its samples, and one at least.

    Args:
        labels: classes, (s,).
        imbalance_ratio: rho, at least 1, of the largest class to the smallest, where both were as large before.
        generator: of the order, and of the samples that stay.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1.

    Example:
        >>> labels = np.repeat([0, 1, 2], 100)
        >>> kept = long_tailed(labels, 100.0, np.random.default_rng(0))
        >>> sorted(np.bincount(labels[kept]).tolist())
        [1, 10, 100]
    """
    classes = generator.permutation(np.unique(labels))
    kept = []
    for rank, label in enumerate(classes):
        own = np.flatnonzero(labels == label)
        part = imbalance_ratio ** (-rank / max(len(classes) - 1, 1))
        kept.append(generator.permutation(own)[: max(1, round(part * len(own)))])
    return np.sort(np.concatenate(kept))


def with_label_noise(
    labels: NDArray[np.int64], groups: Sequence[Sequence[int]], label_noise: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Labels of which a part, in each class, is another one, at random among the classes of its task.

    Args:
        labels: classes, (s,).
        groups: of classes that come together.
        label_noise: part of the samples of each class, in [0, 1).
        generator: of what is drawn.

    Raises:
        UserError: if a class comes alone, and so has no other to be taken for.

    Example:
        >>> labels = np.repeat([0, 1, 2, 3], 10)
        >>> noisy = with_label_noise(labels, [[0, 1], [2, 3]], 0.2, np.random.default_rng(0))
        >>> int((noisy != labels).sum()), bool(((noisy // 2) == (labels // 2)).all())
        (8, True)
    """
    noisy = labels.copy()
    if min(map(len, groups)) < 2:
        raise UserError(
            f"data.label_noise={label_noise}: a task has one class, whose samples cannot be taken for others of the "
            "task; give a larger data.increment."
        )
    for group in groups:
        for label in group:
            own = generator.permutation(np.flatnonzero(labels == label))
            wrong = own[: round(label_noise * len(own))]
            noisy[wrong] = generator.choice([other for other in group if other != label], len(wrong))
    return noisy
