"""The data module that streams tasks one after the other through a single `trainer.fit`."""

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader

from mh_lightning.backbones import Backbone
from mh_lightning.data.labelled import Labelled, StreamDataset, check_finite, check_labels
from mh_lightning.data.sampler import StreamBatchSampler
from mh_lightning.data.scenarios import class_groups, class_incremental
from mh_lightning.errors import UserError, reason_of

SPLIT_OPTIONS = ("validation_fraction", "split_seed", "max_train_samples", "max_test_samples")
ORDER_OPTIONS = ("epochs_per_task", "batch_size")


class Splits(NamedTuple):
    """A data set as it was read, before it is cut into tasks."""

    train: Labelled
    test: Labelled
    class_names: list[str]


class StreamDataModule(LightningDataModule):
    """Class-incremental stream: tasks of some classes each, in sequence, `epochs_per_task` epochs a task.

    The epoch tells the task, so a resumed run goes on in the right one. Images get the transform of the model's
    backbone. Evaluation always covers the samples of all tasks, those still to come included. Subclasses define
    `load`.

    Args:
        increment: classes a task.
        first_task_size: classes of the first task, by default `increment`.
        class_order: order in which classes appear, by default 0 to C-1.
        class_order_seed: seed of a random class order instead.
        epochs_per_task: passes over each task's training samples.
        batch_size: of the whole batch, over all devices.
        eval_batch_size: of an evaluation batch, over all devices.
        num_workers: processes that load data; 0 loads in the main process.
        validation_fraction: part of the training samples, the same of each class, that is held out. Metrics are then
            computed on it too, to choose hyper-parameters without touching test data.
        split_seed: seed of the held-out part and of `max_train_samples` and `max_test_samples`.
        max_train_samples: use a random subset of this many training samples, stratified by class.
        max_test_samples: the same for test samples.
        augment: random training transform of the backbone instead of its evaluation transform.

    Attributes:
        class_groups: the classes of each task, after `setup`.
        class_names: name of each class, after `setup`.
    """

    def __init__(
        self,
        increment: int = 1,
        first_task_size: int | None = None,
        class_order: list[int] | None = None,
        class_order_seed: int | None = None,
        epochs_per_task: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        validation_fraction: float = 0.0,
        split_seed: int = 0,
        max_train_samples: int | None = None,
        max_test_samples: int | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("epochs_per_task", epochs_per_task),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
        ):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}.")
        for name, limit in (("max_train_samples", max_train_samples), ("max_test_samples", max_test_samples)):
            if limit is not None and limit < 1:
                raise UserError(f"data.{name} must be at least 1, got {limit}.")
        if num_workers < 0:
            raise UserError(f"data.num_workers must not be negative, got {num_workers}.")
        if not 0 <= split_seed < 2**32:
            raise UserError(f"data.split_seed must lie in [0, 2**32), got {split_seed}.")
        if not 0 <= validation_fraction < 1:
            raise UserError(f"data.validation_fraction must lie in [0, 1), got {validation_fraction}.")
        self.increment, self.first_task_size = increment, first_task_size
        self.class_order, self.class_order_seed = class_order, class_order_seed
        self.epochs_per_task, self.batch_size, self.eval_batch_size = epochs_per_task, batch_size, eval_batch_size
        self.num_workers, self.augment = num_workers, augment
        self.validation_fraction, self.split_seed = validation_fraction, split_seed
        self.max_train_samples, self.max_test_samples = max_train_samples, max_test_samples
        self.class_groups: list[list[int]] = []
        self.class_names: list[str] = []
        self._splits: dict[str, Labelled] = {}
        self._tasks: dict[str, list[NDArray[np.int64]]] = {}

    @abstractmethod
    def load(self) -> Splits:
        """Read the training and the test samples."""

    @property
    def num_classes(self) -> int:
        """C, over all tasks."""
        return len(self.class_names)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.class_groups)

    @property
    def evaluation_splits(self) -> list[str]:
        """The splits that evaluation covers, in the order of the loaders."""
        return ["test", "validation"] if self.validation_fraction else ["test"]

    def task_of_epoch(self, epoch: int) -> int:
        """The task that an epoch trains, both from 0."""
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def num_samples(self, split: str, task: int) -> int:
        """Samples of a task in a split: "train", "test" or "validation"."""
        return len(self._tasks[split][task])

    def setup(self, stage: str) -> None:
        """Read the data, check it and cut it into tasks. All stages need the same."""
        if self._splits:
            return
        data = self.load()
        for split in ("train", "test"):
            samples: Labelled = getattr(data, split)
            check_labels(samples.labels, len(data.class_names), split)
            check_finite(samples.inputs, split)
        groups = class_groups(
            len(data.class_names), self.increment, self.first_task_size, self.class_order, self.class_order_seed
        )
        train = self._subset(data.train, self.max_train_samples, "max_train_samples")
        splits = {"train": train, "test": self._subset(data.test, self.max_test_samples, "max_test_samples")}
        if self.validation_fraction:
            kept, held_out = self._split(train, self.validation_fraction, "validation_fraction")
            splits |= {"train": train.take(kept), "validation": train.take(held_out)}
        tasks = {split: class_incremental(samples.labels, groups) for split, samples in splits.items()}
        for split, parts in tasks.items():
            empty = [group for group, part in zip(groups, parts, strict=True) if not len(part)]
            if empty:
                raise UserError(f"data: no {split} sample of classes {empty[0]}; each task needs some in every split.")
        self._splits, self._tasks, self.class_groups, self.class_names = splits, tasks, groups, data.class_names

    def _subset(self, samples: Labelled, size: int | None, option: str) -> Labelled:
        if size is None or size >= len(samples.labels):
            return samples
        return samples.take(self._split(samples, size, option)[1])

    def _split(self, samples: Labelled, size: int | float, option: str) -> list[NDArray[np.int64]]:
        try:
            parts: list[NDArray[np.int64]] = train_test_split(
                np.arange(len(samples.labels)), test_size=size, stratify=samples.labels, random_state=self.split_seed
            )
        except ValueError as error:
            raise UserError(
                f"data.{option}={size} cannot be drawn from the {len(samples.labels)} samples with each class on both "
                f"sides: {reason_of(error)}."
            ) from error
        return [np.sort(part) for part in parts]

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's training samples, in a random order that depends on the global seed and the epoch."""
        task = self.task_of_epoch(self.trainer.current_epoch) if self.trainer else 0
        ranks = self.trainer.world_size if self.trainer else 1
        if self.batch_size % ranks:
            raise UserError(f"data.batch_size={self.batch_size} must be a multiple of the {ranks} devices.")
        epoch = self.trainer.current_epoch if self.trainer else 0
        seed = np.random.SeedSequence([int(os.environ.get("PL_GLOBAL_SEED", 0)), epoch]).generate_state(1)[0]
        return self._loader("train", self._tasks["train"][task], self.batch_size, int(seed), even=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """All tasks' samples: one loader for each of `evaluation_splits`."""
        return [self._evaluation_loader(split) for split in self.evaluation_splits]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """All tasks' test samples."""
        return [self._evaluation_loader("test")]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """All tasks' test samples, in the order of the data."""
        return [self._evaluation_loader("test")]

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return self._loader(split, np.arange(len(self._splits[split].labels)), self.eval_batch_size)

    def _loader(
        self, split: str, indices: NDArray[np.int64], batch_size: int, seed: int | None = None, even: bool = False
    ) -> DataLoader[Any]:
        task_of_sample = np.empty(len(self._splits[split].labels), dtype=np.int64)
        for task, part in enumerate(self._tasks[split]):
            task_of_sample[part] = task
        dataset = StreamDataset(
            self._splits[split].take(indices),
            task_of_sample[indices],
            self._transform(split == "train" and self.augment),
        )
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = StreamBatchSampler(len(dataset), batch_size, seed, even, rank, ranks)
        if not len(sampler):
            raise UserError(
                f"data.batch_size={batch_size}: a task of {len(dataset)} {split} samples is too small for "
                f"{ranks} devices."
            )
        # workers draw from the loader's own generator, so that resuming does not change what they draw
        generator = torch.Generator().manual_seed(seed or 0)
        return DataLoader(dataset, batch_sampler=sampler, num_workers=self.num_workers, generator=generator)

    def first_input(self) -> Tensor:
        """The first test sample as a batch of one, to try a model on."""
        first = np.zeros(1, dtype=np.int64)
        dataset = StreamDataset(self._splits["test"].take(first), first, self._transform(augment=False))
        return dataset[0][0].unsqueeze(0)

    def evaluation_batch(self, split: str, batch_idx: int) -> list[int]:
        """Places in the data of the samples of this rank's evaluation batch."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        start = batch_idx * self.eval_batch_size
        stop = min(start + self.eval_batch_size, len(self._splits[split].labels))
        return list(range(start + rank, stop, ranks))

    def _transform(self, augment: bool) -> Callable[[Any], Tensor] | None:
        backbone = getattr(self.trainer.lightning_module, "backbone", None) if self.trainer else None
        return backbone.transform(augment) if isinstance(backbone, Backbone) else None

    def state_dict(self) -> dict[str, Any]:
        """What makes the stream, kept in checkpoints so that none can be resumed on another one."""
        return {
            "class_groups": self.class_groups,
            **{name: getattr(self, name) for name in SPLIT_OPTIONS + ORDER_OPTIONS},
            "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's stream with this one: all of it to train on, what splits the data to evaluate.

        Raises:
            UserError: if they differ.
        """
        own = self.state_dict()
        training = self.trainer is None or self.trainer.state.fn == "fit"
        for name, saved in state_dict.items():
            if saved != own[name] and (training or name in ("class_groups", *SPLIT_OPTIONS)):
                raise UserError(
                    f"ckpt_path: the checkpoint comes from another stream, with {name} {saved} instead of {own[name]}; "
                    "use the configuration it was trained with."
                )
