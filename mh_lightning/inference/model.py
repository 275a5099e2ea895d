"""A trained model that answers: names of classes and probabilities for images or features."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mh_lightning.backbones import Backbone
from mh_lightning.callbacks.checkpoints import AtomicCheckpointIO
from mh_lightning.data.labelled import stacked
from mh_lightning.data.learnt_stream import LearntStream, joined_classes
from mh_lightning.errors import UserError, require
from mh_lightning.growth import grown
from mh_lightning.heads import ClosedFormHead
from mh_lightning.inference.images import as_input, as_sequence
from mh_lightning.methods import ContinualMethod


class Prediction(NamedTuple):
    """What a model says of samples.

    Attributes:
        labels: name of each sample's most probable class.
        probabilities: of all classes, (b, C), in the order of `Model.class_names`.
    """

    labels: list[str]
    probabilities: NDArray[np.float32]


class Model(nn.Module):
    """A method without its trainer, with the names of its classes and what images pass through.

    Args:
        method: with its head and a stream, or a `learnt_stream`.

    Attributes:
        notes: plain values that `save` writes and `load` brings back.

    Example:
        >>> from mh_lightning.backbones import Identity
        >>> from mh_lightning.data.learnt_stream import LearntStream
        >>> from mh_lightning.heads import ClassMeans
        >>> from mh_lightning.methods import ClosedForm
        >>> method = ClosedForm(Identity(2), ClassMeans)
        >>> method.learnt_stream = LearntStream(["cat", "dog"], [[0, 1]])
        >>> method.make_parts()
        >>> method.head.update(torch.eye(2), torch.arange(2))
        >>> labels, probabilities = Model(method).predict(torch.tensor([[0.9, 0.1]]))
        >>> labels, probabilities.shape
        (['cat'], (1, 2))
    """

    def __init__(self, method: ContinualMethod) -> None:
        super().__init__()
        self.method = method.eval()
        self.notes: dict[str, Any] = {}

    @property
    def learnt(self) -> LearntStream:
        """What it keeps of its stream."""
        return self.method.learnt_now()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.method.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Of all classes, in the order of the probabilities."""
        return self.learnt.class_names

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (b, C), float32, of inputs (b, ...) that the transform has made of images."""
        with self.method.evaluating():  # a fit that went on with it has left it in training mode
            logits: Tensor = self.method(x)
        return torch.softmax(logits.float(), dim=1)

    def of_features(self, features: Tensor) -> Tensor:
        """Probabilities (b, C), float32, of the backbone's features (b, n)."""
        with self.method.taking_features():
            return self.forward(features)

    def features(self, inputs: Any, batch_size: int = 64) -> NDArray[np.float32]:
        """The backbone's features (b, n) of images; see `predict`."""
        none = np.zeros((0, self.method.backbone.num_features), np.float32)
        return np.concatenate([none, *(features for features, _ in self.batches(inputs, batch_size))])

    def predict(self, inputs: Any, batch_size: int = 64) -> Prediction:
        """Classes and probabilities.

        Args:
            inputs: paths, PIL images, or arrays of uint8 (height, width), (height, width, 3), one or many of them;
                floating-point tensors (b, ...) that are what the transform makes of images, or, where the backbone
                takes images, its features (b, n).
            batch_size: of what passes through the model at once, at least 1.

        Raises:
            UserError: if one of them cannot be read, named by its path, or is nothing that the model takes.
        """
        parts = [probabilities for _, probabilities in self.batches(inputs, batch_size)]
        found = np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)
        return Prediction([self.class_names[best] for best in found.argmax(axis=1)], found)

    @torch.no_grad()
    def batches(self, inputs: Any, batch_size: int = 64) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Features (b, n) and probabilities (b, C) of batch after batch; see `predict`."""
        require("batch_size", batch_size, at_least=1, whole=True)
        entries = as_sequence(inputs)
        are_features = False
        if isinstance(entries, Tensor) and entries.dim() == 2 and takes_images(self.method.backbone):
            width, are_features = self.method.backbone.num_features, True
            if entries.shape[1] != width:
                raise UserError(f"Features must be (b, {width}), got {tuple(entries.shape)}.")
        for start in range(0, len(entries), batch_size):
            part = entries[start : start + batch_size]
            if are_features and not self.method.answers_from_features:
                raise UserError(f"{type(self.method).__name__} needs images, not features.")
            x = (part if isinstance(part, Tensor) else self._inputs(part)).to(self.device)
            x = x if (dtype := self._dtype()) is None else x.to(dtype)
            features = x if are_features else self.method.features(x)
            if not bool(features.isfinite().all()):
                raise UserError("The inputs, or their features, hold NaN or infinite values.")
            answers = self.of_features(features) if self.method.answers_from_features else self.forward(x)
            yield features.float().cpu().numpy(), answers.cpu().numpy()

    def learn(self, inputs: Any, labels: Sequence[str]) -> None:
        """Learn more samples, of classes that it knows or not, if its head is in closed form.

        Args:
            inputs: as in `predict`.
            labels: name of the class of each.

        Raises:
            UserError: if the head learns by gradient, or a sample cannot be read or learnt; then none is.
        """
        head = self.method.head
        if not isinstance(head, ClosedFormHead):
            raise UserError(f"learn: a {type(head).__name__} learns by gradient; go on with mh_lightning.fit.")
        if isinstance(labels, str) or not isinstance(labels, Sequence | np.ndarray):
            raise UserError(f"learn: labels must be a list of class names, got {type(labels).__name__}.")
        if not all(isinstance(label, str) for label in labels):
            raise UserError(
                f"learn: labels must be class names, got {next(x for x in labels if not isinstance(x, str))!r}."
            )
        labels = [str(label) for label in labels]
        parts = [torch.from_numpy(features) for features, _ in self.batches(inputs)]
        if sum(map(len, parts)) != len(labels):
            raise UserError(f"learn: {sum(map(len, parts))} samples were given, and {len(labels)} labels.")
        if not parts:
            return
        names, numbers = joined_classes(self.class_names, list(dict.fromkeys(labels)))
        number = {name: int(place) for name, place in zip(dict.fromkeys(labels), numbers, strict=True)}
        head = grown(head, len(names))
        head.update(torch.cat(parts).to(self.device), torch.tensor([number[label] for label in labels]))
        self.method.head = head
        self.method.learnt_stream = self.learnt._replace(class_names=names)

    def _inputs(self, entries: Sequence[Any]) -> Tensor:
        return stacked([as_input(entry, self.method.backbone, self.learnt) for entry in entries])

    def _dtype(self) -> torch.dtype | None:
        """That of the weights, if there are any."""
        floats = (one for one in self.method.parameters() if one.is_floating_point() and one.numel())
        return next((one.dtype for one in floats), None)

    def save(self, path: str | Path) -> None:
        """Write all of it, the backbone's weights included, into one file for `mh_lightning.load`.

        Raises:
            UserError: if notes are no plain values.
        """
        kept = io.BytesIO()
        try:
            torch.save(self.notes, kept)
            torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
        except Exception as error:
            raise UserError("notes must be plain values: texts, numbers, lists and dicts of them.") from error
        AtomicCheckpointIO().save_checkpoint(
            {**self.method.description(), "state_dict": self.method.state_dict(), "notes": self.notes}, path
        )


def takes_images(backbone: Backbone) -> bool:
    """Whether vectors cannot be a backbone's inputs."""
    return backbone.image_format() is not None
