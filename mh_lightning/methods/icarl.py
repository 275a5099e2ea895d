"""iCaRL: exemplars chosen by herding, and the nearest mean of exemplars."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.distributed import gather_in_turn
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods.base import Batch, Head
from mh_lightning.methods.distillation import DistillingMethod
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.replay_buffer import Samples
from mh_lightning.methods.task_samples import batches_of_task, features_of_task


def herd(features: Tensor, count: int) -> list[int]:
    """The samples, one after the other, whose mean comes nearest to that of all.

    Args:
        features: (s, n).
        count: of samples, clamped to s.

    Source: Rebuffi et al., CVPR 2017, algorithm 4.

    Example:
        >>> herd(torch.tensor([[0.0], [1.0], [2.0], [5.0]]), 2)
        [2, 1]
    """
    features = features.double()
    mean = features.mean(dim=0)
    total = torch.zeros_like(mean)
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    for number in range(1, min(count, len(features)) + 1):
        away = (mean - (total + features) / number).square().sum(dim=1)
        place = int(away.masked_fill(~left, torch.inf).argmin())
        chosen.append(place)
        left[place] = False
        total += features[place]
    return chosen


class Normalized(nn.Module):
    """A head for features of length 1."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """What the head answers to x / |x|."""
        answer: Tensor = self.head(F.normalize(features.float(), dim=1))
        return answer


class ICaRL(DistillingMethod, ReplayMethod):
    r"""Learns by the binary cross-entropy of each class so far: of new classes with the sample's own, of earlier ones
    with what the model before the task answered; on each batch together with exemplars. When a task ends, each class
    so far keeps `buffer_size` / classes exemplars, the first by herding, on features of length 1; predictions are the
    nearest mean of a class's exemplars.

    Where a class comes again in a later task, its places are shared evenly among these tasks.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017. There, exemplars
    and new samples are one training set; here `replay_batch_size` of them come with each batch.

    Args:
        backbone: maps inputs to features.
        head: makes the head, which learns features, from the numbers of features and of classes.
        buffer_size: exemplars to keep in all, at least one a class, and not more than there are training samples.
        replay_batch_size: exemplars, at least 1, drawn for each batch, over all devices.
        options: of `ContinualMethod`, but for losses of its own.

    Attributes:
        exemplar_means: answers in evaluation.
    """

    def __init__(
        self, backbone: nn.Module, head: Head, buffer_size: int, replay_batch_size: int = 10, **options: Any
    ) -> None:
        super().__init__(backbone, head, buffer_size=buffer_size, replay_batch_size=replay_batch_size, **options)
        if (self.loss, self.classes_in_loss) != ("cross_entropy", "all"):
            raise UserError("model.init_args.loss and classes_in_loss: ICaRL has a loss of its own; leave them out.")
        self.exemplar_means: ClassMeans | None = None

    def make_parts(self) -> None:
        """Make the head, the buffer, and what predicts."""
        super().make_parts()
        self.exemplar_means = self._no_means()

    def grow_parts(self) -> None:
        """All of it for more classes."""
        super().grow_parts()
        assert self.exemplar_means is not None
        self.exemplar_means.grow(self.stream.num_classes)

    def on_fit_start(self) -> None:
        """Refuse more exemplars than there are samples."""
        samples = sum(self.stream.num_samples("train", task) for task in range(self.stream.num_tasks))
        if self.buffer_size > samples and not self.goes_on:
            raise UserError(
                f"model.init_args.buffer_size={self.buffer_size}: the stream has {samples} training samples to choose "
                "exemplars from; give at most that many."
            )
        super().on_fit_start()

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The binary cross-entropies, summed over the classes so far, of the batch and of exemplars."""
        assert self.replay_buffer is not None and self.head is not None
        inputs, classes, rows = self.joined(batch, self.replay_buffer.draw(self.replay_batch_size))
        self.replay_buffer.pass_by(self.rows_of(batch))
        features = self.features(inputs)
        logits = self.head(features)
        wanted = F.one_hot(classes, logits.shape[1]).to(logits.dtype)
        if self.teacher is not None:
            old = self.classes_until(self.task)
            wanted[:, old] = self.told(inputs, features)[:, old].sigmoid().to(wanted.dtype)
        seen = self.classes_until(self.task + 1)
        losses = F.binary_cross_entropy_with_logits(logits[:, seen].float(), wanted[:, seen].float(), reduction="none")
        return self.mean_over_samples(losses.sum(dim=1), rows), logits[: len(batch[1])]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C): in training, and before the first task has ended, those of the head."""
        assert self.exemplar_means is not None and self.head is not None
        features = self.features(x)
        if self.training or not bool(self.exemplar_means.counts.any()):
            logits: Tensor = self.head(features)
            return logits
        return self.exemplar_means.calibrated(F.normalize(features.float(), dim=1))

    def answering_head(self) -> nn.Module:
        """The nearest mean of exemplars."""
        assert self.exemplar_means is not None
        return Normalized(self.exemplar_means.solved())

    @torch.no_grad()
    def on_task_end(self, task: int) -> None:
        """Choose exemplars, and keep the model as the next task's teacher."""
        assert self.replay_buffer is not None and self.exemplar_means is not None
        kept, kept_features = self.replay_buffer.content(), self._features_of_exemplars()
        parts = [gather_in_turn(*part) for part in features_of_task(self, task, "Features to choose exemplars by")]
        features = F.normalize(torch.cat([*(part[0] for part in parts), kept_features]), dim=1)
        classes = torch.cat([*(part[1] for part in parts), kept[1]])
        new = len(features) - len(kept_features)
        each = self.buffer_size // len(self.classes_until(self.task + 1))
        chosen = _chosen(features, classes, kept[2], each)
        samples = self._samples_at(task, chosen, new, kept)
        self.replay_buffer.replace(*samples)
        self.exemplar_means = self._no_means().to(self.device)
        self.exemplar_means.update(features[torch.from_numpy(chosen)], samples[1])
        self.exemplar_means.ensure_solved()
        super().on_task_end(task)

    def _no_means(self) -> ClassMeans:
        means = ClassMeans(self.backbone.num_features, self.stream.num_classes)
        return means.requires_grad_(False)  # steps leave it alone

    def _features_of_exemplars(self) -> Tensor:
        assert self.replay_buffer is not None
        inputs = self.replay_buffer.content()[0]
        features = torch.zeros(0, self.backbone.num_features, device=self.device)
        with self.evaluating(), self.trainer.precision_plugin.forward_context():
            batches = torch.split(inputs, self.stream.eval_batch_size) if len(inputs) else ()
            return torch.cat([features, *(self.features(batch).float() for batch in batches)])

    def _samples_at(self, task: int, chosen: NDArray[np.int64], new: int, kept: Samples) -> Samples:
        """Inputs, classes and tasks of samples, of which those of the task are read once more."""
        read = np.sort(chosen[chosen < new])
        parts = [gather_in_turn(*batch) for batch in batches_of_task(self, task, "Exemplars", read)]
        pool = [*parts, kept] if len(kept[0]) else parts
        columns = [torch.cat([part[column].to(self.device) for part in pool]) for column in range(3)]
        place_of = {int(place): row for row, place in enumerate(read)}
        place_of |= {new + row: len(read) + row for row in range(len(kept[0]))}
        rows = torch.tensor([place_of[int(place)] for place in chosen], device=self.device)
        return tuple(column[rows] for column in columns)


def _chosen(features: Tensor, classes: Tensor, tasks_of_kept: Tensor, each: int) -> NDArray[np.int64]:
    """Places among samples, of which the first are new and the others were kept, in the order of herding: at most
    `each` of a class, shared evenly among its tasks.
    """
    new = len(classes) - len(tasks_of_kept)
    chosen: list[int] = []
    for label in torch.bincount(classes).nonzero().flatten().tolist():
        own = (classes[:new] == label).nonzero().flatten()
        kept = (classes[new:] == label).nonzero().flatten()
        tasks = tasks_of_kept[kept]
        earlier = [kept[tasks == task] + new for task in sorted({*tasks.tolist()})]  # each in the order of herding
        groups = [*earlier, own[herd(features[own], each)]] if len(own) else earlier
        for place, group in enumerate(groups):  # what does not divide goes to the newest
            chosen += group[: (each + place) // len(groups)].tolist()
    return np.array(chosen, dtype=np.int64)
