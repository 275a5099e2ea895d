"""Labelled samples: what every data set is read into, and what the loaders draw from."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mh_lightning.data.images import ImageReading, read_image
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError
from mh_lightning.random_numbers import drawing_from


class Rows(Sequence[Any]):
    """Some rows of a sequence or tensor, repeated ones included, without a copy.

    Args:
        source: paths or a tensor.
        rows: indices of the source.

    Example:
        >>> list(Rows(["a", "b"], np.array([1, 1, 0])))
        ['b', 'b', 'a']
    """

    def __init__(self, source: Sequence[Any] | Tensor, rows: NDArray[np.int64]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source[int(self.rows[index])]

    def take(self, indices: NDArray[np.int64]) -> "Rows":
        """Some of the rows."""
        return Rows(self.source, self.rows[indices])


class Labelled(NamedTuple):
    """Samples with their classes and, where there are several, domains.

    Inputs are paths of images, a uint8 tensor of images (samples, height, width) or (samples, height, width, 3), a
    floating-point tensor (samples, ...) that goes to the backbone as it is, or features from a cache. `reading` tells
    how files at paths become RGB.
    """

    inputs: Sequence[str] | Tensor | Rows | StoredFeatures
    labels: NDArray[np.int64]
    domains: NDArray[np.int64] | None = None
    reading: ImageReading = ImageReading()

    def take(self, indices: NDArray[np.int64]) -> "Labelled":
        """The samples at `indices`."""
        inputs: Sequence[str] | Tensor | Rows | StoredFeatures
        if isinstance(self.inputs, Tensor):
            inputs = self.inputs[torch.from_numpy(indices)]
        elif isinstance(self.inputs, Rows | StoredFeatures):
            inputs = self.inputs.take(indices)
        else:
            inputs = [self.inputs[index] for index in indices]
        domains = None if self.domains is None else self.domains[indices]
        return self._replace(inputs=inputs, labels=self.labels[indices], domains=domains)

    @property
    def domain_of_sample(self) -> NDArray[np.int64]:
        """Domain of each sample, 0 where there is only one."""
        return np.zeros_like(self.labels) if self.domains is None else self.domains

    @property
    def features(self) -> Tensor | None:
        """The inputs (samples, ...) if they are numbers that need no transform."""
        return self.inputs if isinstance(self.inputs, Tensor) and self.inputs.is_floating_point() else None


Item = tuple[Tensor, int, int]
Batch = tuple[Tensor, Tensor, Tensor]


class StreamDataset(Dataset[Item]):
    """Items (x, class, task).

    Args:
        samples: where the items come from.
        tasks: index of the task of each sample, (samples,).
        transform: applied to images; None passes tensors on.
        perturbations: of images, one a domain, on samples from `one_domain_a_perturbation`; applied before the
            transform.
        perturbation_seed: of what perturbations draw; the same image is always perturbed alike.
        transform_seed: of what the transform draws for each sample, whichever process does it and whatever came before;
            by default it draws from the global generators.
    """

    def __init__(
        self,
        samples: Labelled,
        tasks: NDArray[np.int64],
        transform: Callable[[Any], Tensor] | None = None,
        perturbations: Sequence[Perturbation] = (),
        perturbation_seed: Sequence[int] = (0,),
        transform_seed: int | None = None,
    ) -> None:
        self.samples, self.tasks, self.transform = samples, tasks, transform
        self.perturbations, self.perturbation_seed = perturbations, perturbation_seed
        self.transform_seed = transform_seed

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, index: int) -> Item:
        return self.input(index), int(self.samples.labels[index]), int(self.tasks[index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch, as the loader asks for it."""
        labels, tasks = (torch.from_numpy(part[indices]) for part in (self.samples.labels, self.tasks))
        if isinstance(self.samples.inputs, StoredFeatures):
            return self.samples.inputs.gather(indices), labels, tasks
        if self.samples.features is not None:
            return self.samples.features[indices], labels, tasks
        if not indices:  # the share of a rank that has no sample of a batch
            return self.input(0).unsqueeze(0)[:0], labels, tasks
        return stacked([self.input(index) for index in indices]), labels, tasks

    def input(self, index: int) -> Tensor:
        """A sample as it goes to the backbone, without its class."""
        if isinstance(self.samples.inputs, StoredFeatures):
            return self.samples.inputs.gather([index])[0]
        if self.samples.features is not None:
            return self.samples.features[index]
        entry = self.samples.inputs[index]
        if isinstance(entry, Tensor):
            image = Image.fromarray(entry.numpy()).convert("RGB")
        else:
            image = read_image(entry, self.samples.reading)
        if self.perturbations:
            image = self._perturb(image, index)
        if self.transform is not None:
            with nullcontext() if self.transform_seed is None else drawing_from(self.transform_seed, index):
                return self.transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def _perturb(self, image: Image.Image, index: int) -> Image.Image:
        assert isinstance(self.samples.inputs, Rows)
        domain, row = int(self.samples.domain_of_sample[index]), int(self.samples.inputs.rows[index])
        generator = np.random.default_rng([*self.perturbation_seed, domain, row])
        return Image.fromarray(self.perturbations[domain](np.asarray(image), generator))


def stacked(inputs: list[Tensor]) -> Tensor:
    """Inputs of one size as a batch.

    Raises:
        UserError: if their sizes differ.

    Example:
        >>> stacked([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: data: inputs of the shapes (3, 4, 4) and (3, 4, 5) make no batch; give a \
backbone whose transform makes all images one size, such as mh_lightning.backbones.ModuleBackbone with image_size.
    """
    shapes = dict.fromkeys(tuple(one.shape) for one in inputs)
    if len(shapes) > 1:
        first, other, *_ = shapes
        raise UserError(
            f"data: inputs of the shapes {first} and {other} make no batch; give a backbone whose transform makes all "
            "images one size, such as mh_lightning.backbones.ModuleBackbone with image_size."
        )
    batch: Tensor = default_collate(inputs)
    return batch


def already_collated(batch: Any) -> Any:
    """What a loader does with a batch of `StreamDataset`: nothing."""
    return batch
