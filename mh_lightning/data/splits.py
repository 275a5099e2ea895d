"""How samples are divided among training, validation and test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.errors import UserError

PUBLISHED_SHUFFLE = 1234  # seed of the published 2-D streams' permutations


class Splits(NamedTuple):
    """A data set as it was read, before it is cut into tasks.

    One that comes without test samples is all `train`, and is split by `split_anew`.
    """

    train: Labelled
    test: Labelled | None
    class_names: list[str]
    validation: Labelled | None = None


def split_as_asked(
    data: Splits,
    perturbations: Sequence[Perturbation],
    *,
    validation_fraction: float,
    split_fractions: Sequence[float] | None,
    validation_tasks: str,
    split_seed: int,
    max_train_samples: int | None,
    max_test_samples: int | None,
) -> dict[str, Labelled]:
    """The samples of each split, by the options of `StreamDataModule`.

    Raises:
        UserError: if an option does not fit the data set.
    """
    if split_fractions is not None:
        data = split_anew(data, split_fractions)
    elif validation_fraction and data.validation is not None:
        raise UserError("data.validation_fraction: this data set has validation samples of its own; leave it out.")
    if data.test is None:
        raise UserError(
            "data.split_fractions is null, but this data set has no test samples of its own; give the fractions of "
            "training, validation and test samples, such as [0.7, 0.1, 0.2]."
        )

    def at_most(samples: Labelled, size: int | None, option: str) -> Labelled:
        if size is None or size >= len(samples.labels):
            return samples
        return samples.take(draw_stratified(samples, size, split_seed, option, data.class_names)[1])

    train = at_most(data.train, max_train_samples, "max_train_samples")
    splits = {"train": train, "test": at_most(data.test, max_test_samples, "max_test_samples")}
    if validation_fraction:
        kept, held_out = draw_stratified(
            train, validation_fraction, split_seed, "validation_fraction", data.class_names
        )
        splits |= {"train": train.take(kept), "validation": train.take(held_out)}
    elif data.validation is not None:
        splits["validation"] = data.validation
    elif validation_tasks != "all":
        raise UserError(
            "data.validation_tasks=first_half needs validation samples; give data.validation_fraction or "
            "data.split_fractions."
        )
    if perturbations:
        splits = {split: one_domain_a_perturbation(samples, len(perturbations)) for split, samples in splits.items()}
    return splits


def draw_stratified(
    samples: Labelled, size: int | float, seed: int, option: str, class_names: Sequence[str]
) -> list[NDArray[np.int64]]:
    """The indices of two random parts, sorted, the second with `size` samples (or that fraction): each class of each
    domain in proportion, and at least one of it on both sides.

    Raises:
        UserError: names the option, and a class that would be missing on a side.
    """
    places = _places_of_kinds(samples)
    counts = np.array([len(part) for part in places])
    kinds, total = len(counts), int(counts.sum())
    drawn = size if isinstance(size, int) else math.ceil(size * total)
    if counts.min() < 2 or not kinds <= drawn <= total - kinds:
        rarest = places[counts.argmin()]
        mend = "add samples of it" if counts.min() < 2 else f"draw {kinds} to {total - kinds}"
        raise UserError(
            f"data.{option}={size} draws {drawn} of {total} samples, and "
            f"{_name_of(samples, rarest[0], class_names)}, which has {len(rarest)}, would be missing on one side; "
            f"{mend}, so that each class is on both, or leave the option out."
        )
    generator = np.random.RandomState(seed)
    parts: list[list[NDArray[np.int64]]] = [[], []]
    for of_kind, count in zip(places, stratified_sizes(counts, drawn, seed).tolist(), strict=True):
        for part, piece in zip(parts, np.split(generator.permutation(of_kind), [-count]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def stratified_sizes(counts: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """How many of each kind to draw, `size` in all: in proportion to `counts`, but at least 1, and at least 1 is left.

    What rounding down leaves goes to the largest remainders, and what rare kinds get is taken where there is most
    above the proportion; ties are broken by the seed.

    Example:
        >>> stratified_sizes(np.array([100, 200, 300, 2]), 30, seed=0).tolist()
        [5, 10, 14, 1]
    """
    wanted, most = counts * (size / counts.sum()), counts - 1
    sizes: NDArray[np.int64] = np.clip(np.floor(wanted + 1e-9).astype(np.int64), 1, most)
    ties = np.random.default_rng(seed).permutation(len(counts))
    while missing := size - int(sizes.sum()):
        step = 1 if missing > 0 else -1
        gaps = np.where(sizes < most if missing > 0 else sizes > 1, step * (wanted - sizes), -np.inf)
        first = np.lexsort((ties, -gaps))[: abs(missing)]
        sizes[first[np.isfinite(gaps[first])]] += step
    return sizes


def split_anew(splits: Splits, fractions: Sequence[float]) -> Splits:
    """Pool all samples, and cut each class of each domain, in the data's order, into training, validation and test.

    Args:
        splits: as read.
        fractions: of training, validation and test; they sum to 1.

    Raises:
        UserError: on other fractions, or names a class that would be missing in a part.

    Example:
        >>> ten = Labelled(torch.zeros(10, 1), np.zeros(10, dtype=np.int64))
        >>> again = split_anew(Splits(ten, ten, ["0"]), [0.7, 0.1, 0.2])
        >>> len(again.train.labels), len(again.validation.labels), len(again.test.labels)
        (14, 2, 4)
    """
    if (
        len(fractions) != 3
        or min(fractions) < 0
        or not abs(sum(fractions) - 1) < 1e-9
        or not (fractions[0] and fractions[2])
    ):
        raise UserError(
            "data.split_fractions must be three fractions of training, validation and test samples that sum to 1, "
            f"such as [0.7, 0.1, 0.2]; got {list(fractions)}."
        )
    pool = concatenate([part for part in (splits.train, splits.validation, splits.test) if part is not None])
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    kinds = _places_of_kinds(pool)
    for places in kinds:
        ends = [round(len(places) * fractions[0]), round(len(places) * (fractions[0] + fractions[1]))]
        for part, piece in zip(parts, np.split(places, ends), strict=True):
            part.append(piece)
    for number, split in ((0, "training"), (2, "test"), (1, "validation")):
        missing = [places for places, piece in zip(kinds, parts[number], strict=True) if not len(piece)]
        if fractions[number] and missing:
            raise UserError(
                f"data.split_fractions={list(fractions)} gives no {split} sample of "
                f"{_name_of(pool, missing[0][0], splits.class_names)}, which has {len(missing[0])}; give other "
                "fractions, or add samples of it."
            )
    train, validation, test = (pool.take(np.sort(np.concatenate(part))) for part in parts)
    return Splits(train, test, splits.class_names, validation if fractions[1] else None)


def concatenate(parts: Sequence[Labelled]) -> Labelled:
    """All samples, one part after the other; they must be of one kind."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.inputs for part in parts if isinstance(part.inputs, Tensor)]
    paths = [path for part in parts for path in part.inputs if isinstance(path, str)]
    inputs = torch.cat(tensors) if len(tensors) == len(parts) else paths
    labels = np.concatenate([part.labels for part in parts])
    domains = None if parts[0].domains is None else np.concatenate([part.domain_of_sample for part in parts])
    return parts[0]._replace(inputs=inputs, labels=labels, domains=domains)


def one_domain_a_perturbation(samples: Labelled, perturbations: int) -> Labelled:
    """Each sample once in each of so many domains.

    Raises:
        UserError: if the samples are no images, or have domains already.

    Example:
        >>> twice = one_domain_a_perturbation(Labelled(["a", "b"], np.array([0, 1])), 2)
        >>> list(twice.inputs), twice.domains.tolist()
        (['a', 'b', 'a', 'b'], [0, 0, 1, 1])
    """
    if samples.features is not None:
        raise UserError(
            "data.perturbations change images, but this data set holds floating-point features; leave it out."
        )
    if samples.domains is not None or isinstance(samples.inputs, Rows):
        raise UserError("data.perturbations make domains, but this data set has its own; leave it out.")
    count = len(samples.labels)
    rows = np.tile(np.arange(count), perturbations)
    domains = np.repeat(np.arange(perturbations), count)
    return samples._replace(inputs=Rows(samples.inputs, rows), labels=samples.labels[rows], domains=domains)


def first_half(samples: Labelled, tasks: Sequence[NDArray[np.int64]]) -> Labelled:
    """The samples of the first half of the tasks; of a single task, half of its samples.

    With the published permutation, ``numpy.random.RandomState(1234)``, so that the 2-D streams are the published ones.
    """
    if len(tasks) > 1:
        return samples.take(np.sort(np.concatenate(tasks[: len(tasks) // 2])))
    order = np.random.RandomState(PUBLISHED_SHUFFLE).permutation(len(samples.labels))
    return samples.take(order[: max(len(order) // 2, 1)])


def _places_of_kinds(samples: Labelled) -> list[NDArray[np.int64]]:
    """The indices of the samples of each class of each domain that there are samples of."""
    domains = samples.domain_of_sample
    kinds = samples.labels * (domains.max() + 1) + domains
    counts = np.unique(kinds, return_counts=True)[1]
    return np.split(np.argsort(kinds, kind="stable"), np.cumsum(counts)[:-1])


def _name_of(samples: Labelled, place: np.int64, class_names: Sequence[str]) -> str:
    """The class, and the domain if there are several, of a sample, to be shown."""
    name = f"class {class_names[samples.labels[place]]!r}"
    return name if samples.domains is None else f"{name} of domain {samples.domains[place] + 1}"
