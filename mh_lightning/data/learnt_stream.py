"""What a model keeps of the stream that it learnt: its classes, and how images become inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.data.images import WHITE, ImageReading
from mh_lightning.data.transforms import ImageTransforms, Normalization, image_transform
from mh_lightning.errors import UserError


class LearntStream(NamedTuple):
    """Classes of a stream, and what its evaluation does to an image.

    Args:
        class_names: of each class.
        class_groups: classes of each task, those of earlier streams included.
        scenario: of the stream.
        image_transforms: see `mh_lightning.data.transforms.image_transform`.
        normalization: of published transforms.
        reading: how image files become RGB.
        epochs: that were learnt, so that a run which goes on draws other random numbers, those of one long run.
        tasks_begun: how many of the tasks have begun; None for all.
    """

    class_names: list[str]
    class_groups: list[list[int]]
    scenario: str = "CI"
    image_transforms: ImageTransforms = "backbone"
    normalization: Normalization | None = None
    reading: ImageReading = ImageReading(WHITE, upright=True)
    epochs: int = 0
    tasks_begun: int | None = None

    @property
    def was_cut_short(self) -> bool:
        """Whether there are tasks that have not begun."""
        return self.tasks_begun is not None and self.tasks_begun < len(self.class_groups)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def learnt(self) -> "LearntStream":
        """Itself, as a `StreamDataModule` gives it."""
        return self

    def transform(self, backbone: Backbone) -> Callable[[Any], Tensor] | None:
        """What turns a PIL image into the backbone's input, or None if it takes images as they are."""
        return image_transform(self.image_transforms, backbone, augment=False, published=self.normalization)

    def as_plain(self) -> dict[str, Any]:
        """Lists and texts, for a checkpoint."""
        return {
            **self._asdict(),
            "normalization": None if self.normalization is None else [list(part) for part in self.normalization],
            "reading": list(self.reading),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "LearntStream":
        """The inverse of `as_plain`.

        Raises:
            UserError: if it is damaged.
        """
        try:
            ground, upright = plain["reading"]
            normalization = plain["normalization"]
            learnt = cls(**plain)._replace(
                reading=ImageReading(tuple(ground), bool(upright)),
                normalization=None if normalization is None else Normalization(*map(tuple, normalization)),
            )
            whole = (
                isinstance(learnt.class_names, list)
                and all(isinstance(name, str) for name in learnt.class_names)
                and all(isinstance(label, int) for group in learnt.class_groups for label in group)
                and learnt.image_transforms in get_args(ImageTransforms)
                and isinstance(learnt.epochs, int)
                and learnt.epochs >= 0
                and isinstance(learnt.tasks_begun, int | None)
            )
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"from: what the checkpoint says of its stream is damaged ({error}).") from error
        if not whole or len(set(learnt.class_names)) < len(learnt.class_names):
            raise UserError("from: the checkpoint's stream must have class names, each once; it is damaged.")
        return learnt


def joined_classes(known: Sequence[str], names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """All classes, those that are known first, and which of them each of the others is, (len(names),).

    Raises:
        UserError: if a name is there twice.

    Example:
        >>> joined_classes(["cat", "dog"], ["ant", "dog"])
        (['cat', 'dog', 'ant'], array([2, 1]))
    """
    if len({*names}) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"data: the class name {twice!r} is there twice; a model that goes on knows classes by name.")
    every = [*known, *(name for name in names if name not in {*known})]
    place = {name: number for number, name in enumerate(every)}
    return every, np.array([place[name] for name in names])
