"""The data module that streams tasks one after the other through a single `trainer.fit`."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from mh_lightning.backbones import Backbone
from mh_lightning.data.blurry import BlurryBorders, blurred
from mh_lightning.data.corruptions import long_tailed, with_label_noise
from mh_lightning.data.features.cache import FeatureCache
from mh_lightning.data.features.split_features import SplitFeatures
from mh_lightning.data.image_sizes import check_image_sizes
from mh_lightning.data.labelled import (
    Labelled,
    StreamDataset,
    already_collated,
)
from mh_lightning.data.learnt_stream import LearntStream, joined_classes
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.data.preview import extent_of_points, small_pictures
from mh_lightning.data.sample_checks import check_finite, check_labels
from mh_lightning.data.sampler import StreamBatchSampler
from mh_lightning.data.scenarios import Task, class_groups, task_of_samples
from mh_lightning.data.splits import Splits, split_as_asked
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.data.stream_options import GOES_ON, check_options, check_same_stream
from mh_lightning.data.tasks import cut_into_tasks, name_of_task
from mh_lightning.data.transforms import ImageTransforms, Normalization, image_transform
from mh_lightning.errors import UserError
from mh_lightning.random_numbers import global_seed, seed_from

SPLIT_OPTIONS = (
    "validation_fraction",
    "split_fractions",
    "validation_tasks",
    "split_seed",
    "max_train_samples",
    "max_test_samples",
)
ORDER_OPTIONS = (
    "scenario",
    "epochs_per_task",
    "batch_size",
    "evaluate_every_n_tasks",
    "evaluate_untrained",
    "imbalance_ratio",
    "label_noise",
)
SPLIT_NAMES = ("train", "test", "validation")


class StreamDataModule(LightningDataModule):
    """A stream of tasks, one after the other, `epochs_per_task` epochs a task; online with one epoch and small batches.

    The epoch tells the task, so a resumed run goes on in the right one. Images get the transform of the model's
    backbone. Evaluation always covers the samples of all tasks, those still to come included. Subclasses define
    `load`.

    Args:
        scenario: "CI" (class-incremental), "IID", "DI", "CDI" or "CDID"; see
            `mh_lightning.data.scenarios.tasks_of_scenario`.
        increment: classes a task, at least 1, or a list of them, one for each task.
        first_task_size: classes of the first task, by default `increment`.
        last_task_size: classes of the last task, by default `increment`.
        class_order: order in which classes appear, by default 0 to C-1.
        class_order_seed: seed of a random class order instead, in [0, 2**32).
        epochs_per_task: passes over each task's training samples, at least 1.
        batch_size: samples an optimizer step, over all devices, at least 1.
        chunk_size: samples that the method takes from the loader at once; it learns them in optimizer steps of
            `batch_size`, with the same result as without chunks, but without the trainer's cost for each of them. By
            default one batch at a time.
        eval_batch_size: of an evaluation batch, over all devices, at least 1.
        evaluate_every_n_tasks: evaluate after every so many tasks, and after the last. An evaluation covers the test
            samples of all T tasks, and so each one after each task takes T² in time; `max_test_samples` makes it
            smaller.
        evaluate_untrained: evaluate before the first task, too, which forward transfer is measured against.
        num_workers: processes that load data, at least 0, which loads in the main process.
        validation_fraction: part of the training samples in [0, 1), the same of each class and at least one, held out.
            Metrics are then computed on it too, to choose hyper-parameters without touching test data.
        split_fractions: instead of the data's own split, fractions of training, validation and test samples, cut from
            all samples of each class in the data's order; published online streams have [0.7, 0.1, 0.2].
        validation_tasks: "all", or "first_half": hold validation samples of the first half of the tasks only, as
            published for online streams, so that later tasks choose no hyper-parameter.
        split_seed: seed, in [0, 2**32), of the held-out part, of `max_train_samples` and `max_test_samples`, and of
            perturbations, blurry borders, imbalance and label noise.
        max_train_samples: use a random subset of this many training samples, of each class in proportion and at least
            one.
        max_test_samples: the same for test samples.
        augment: train on random transforms of the images instead of the transform of evaluation.
        image_transforms: "backbone" for its own, or published ones, by what training does: "random_resized_crop",
            "jittered_random_resized_crop" or "random_crop"; see `mh_lightning.data.transforms.image_transform`.
        perturbations: of images; each makes a domain of all images, in this order, for scenarios with domains.
        blurry_borders: let training samples come in other tasks than that of their class: `mh_lightning.data.IBlurry`,
            `mh_lightning.data.SiBlurry` or `mh_lightning.data.GaussianSchedule`. Tasks are then not announced.
        announces_tasks: whether the method is told where tasks begin and end; methods that need it refuse the stream
            if not.
        imbalance_ratio: of the largest class to the smallest among the training samples, at least 1: the others lie
            between them, in a random order.
        label_noise: part of the training samples of each class, in [0, 1), that have the label of another class of
            their task. Validation samples keep theirs.
        feature_cache: let each image pass through the frozen backbone once, and keep its features; the stream then
            gives features in place of images.

    Attributes:
        tasks: classes and domain of each task, after `setup`.
        class_names: name of each class, after `setup`.
        batches_done: batches of the current epoch that a resumed run had learnt before; `train_dataloader` leaves
            them out.
        published_normalization: of the published transforms, where the data set has one.
    """

    published_normalization: ClassVar[Normalization | None] = None
    split_options: ClassVar[tuple[str, ...]] = SPLIT_OPTIONS  # those that a checkpoint is evaluated with

    def __init__(
        self,
        scenario: Literal["IID", "CI", "DI", "CDI", "CDID"] = "CI",
        increment: int | list[int] = 1,
        first_task_size: int | None = None,
        last_task_size: int | None = None,
        class_order: list[int] | None = None,
        class_order_seed: int | None = None,
        epochs_per_task: int = 1,
        batch_size: int = 32,
        chunk_size: int | None = None,
        eval_batch_size: int = 128,
        evaluate_every_n_tasks: int = 1,
        evaluate_untrained: bool = False,
        num_workers: int = 0,
        validation_fraction: float = 0.0,
        split_fractions: list[float] | None = None,
        validation_tasks: Literal["all", "first_half"] = "all",
        split_seed: int = 0,
        max_train_samples: int | None = None,
        max_test_samples: int | None = None,
        augment: bool = False,
        image_transforms: ImageTransforms = "backbone",
        perturbations: list[Perturbation] | None = None,
        blurry_borders: BlurryBorders | None = None,
        announces_tasks: bool = True,
        imbalance_ratio: float = 1.0,
        label_noise: float = 0.0,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.scenario, self.chunk_size = scenario, chunk_size
        self.split_fractions, self.validation_tasks = split_fractions, validation_tasks
        self.perturbations, self.feature_cache = perturbations or [], feature_cache
        self.increment, self.first_task_size, self.last_task_size = increment, first_task_size, last_task_size
        self.class_order, self.class_order_seed = class_order, class_order_seed
        self.epochs_per_task, self.batch_size, self.eval_batch_size = epochs_per_task, batch_size, eval_batch_size
        self.evaluate_every_n_tasks, self.evaluate_untrained = evaluate_every_n_tasks, evaluate_untrained
        self.num_workers, self.augment, self.image_transforms = num_workers, augment, image_transforms
        self.validation_fraction, self.split_seed = validation_fraction, split_seed
        self.max_train_samples, self.max_test_samples = max_train_samples, max_test_samples
        self.blurry_borders, self.announces_tasks = blurry_borders, announces_tasks and blurry_borders is None
        self.imbalance_ratio, self.label_noise = imbalance_ratio, label_noise
        check_options(vars(self))
        self.batches_done = 0
        self.tasks: list[Task] = []
        self.class_names: list[str] = []
        self._own_class_names: list[str] = []
        self._known: LearntStream | None = None  # of the model that goes on
        self._splits: dict[str, Labelled] = {}
        self._kept = None if feature_cache is None else SplitFeatures(feature_cache, num_workers)
        self._samples_of_tasks: dict[str, list[NDArray[np.int64]]] = {}
        self._task_of_sample: dict[str, NDArray[np.int64]] = {}

    @abstractmethod
    def load(self) -> Splits:
        """Read the training and the test samples, or all samples as training samples; see `Splits`."""

    @classmethod
    def brings_validation(cls, options: dict[str, Any]) -> bool:
        """Whether the data set has validation samples of its own, with these options of the class."""
        return False

    @property
    def num_classes(self) -> int:
        """C, over all tasks."""
        return len(self.class_names)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.tasks)

    @property
    def class_groups(self) -> list[list[int]]:
        """The classes of each task."""
        return [task.classes for task in self.tasks]

    def name_of_task(self, task: int) -> str:
        """The classes and the domain of a task, to be shown."""
        return name_of_task(self.tasks[task], self.class_names)

    @property
    def evaluation_splits(self) -> list[str]:
        """The splits that evaluation covers, in the order of the loaders."""
        return [split for split in SPLIT_NAMES[1:] if split in self._splits]

    def num_evaluated_tasks(self, split: str) -> int:
        """The leading tasks that a split has samples of."""
        return sum(len(part) > 0 for part in self._samples_of_tasks[split])

    def task_of_epoch(self, epoch: int) -> int:
        """The task that an epoch trains, both from 0."""
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def evaluates_after(self, task: int) -> bool:
        """Whether an evaluation follows a task, counted from 0."""
        return (task + 1) % self.evaluate_every_n_tasks == 0 or task + 1 == self.num_tasks

    def classes_in_training(self, task: int) -> list[int]:
        """The classes of a task's training samples, among them others than its own where borders are blurry."""
        labels: list[int] = np.unique(self._splits["train"].labels[self._samples_of_tasks["train"][task]]).tolist()
        return labels

    def num_samples(self, split: str, task: int) -> int:
        """Samples of a task in a split: "train", "test" or "validation"."""
        return len(self._samples_of_tasks[split][task])

    def go_on_from(self, known: LearntStream | None) -> None:
        """Give classes that a model knows the numbers by which it knows them, and new ones the next numbers.

        Args:
            known: what the model keeps of the stream that it learnt; None if it has learnt nothing.

        Raises:
            UserError: if images would become other inputs than those it has learnt.
        """
        self._known = known
        names = self._own_class_names
        if known is not None:
            own = (self.image_transforms, self.published_normalization if self.image_transforms != "backbone" else None)
            before = (known.image_transforms, known.normalization if known.image_transforms != "backbone" else None)
            if own != before:
                raise UserError(
                    f"data.image_transforms={own[0]}, normalised by {own[1] or 'the backbone'}: the model has learnt "
                    f"images of {before[0]}, normalised by {before[1] or 'the backbone'}; give the same."
                )
            names = known.class_names
        if self.class_names != names:  # else its numbers are those already, and it is not read again
            self._splits = {}

    def setup(self, stage: str) -> None:
        """Read the data, check it, cut it into tasks, and find or extract features if they are kept. All stages need
        the same.
        """
        if not self._splits:
            self._cut()
        needed = {"fit": [*self._splits], "validate": self.evaluation_splits}.get(stage, ["test"])
        self._check_untransformed([self._splits[split] for split in needed])
        if self._kept is not None:
            self._kept.forget()
            for split in needed:
                self._features(split, split == "train" and self.augment)

    def _check_untransformed(self, parts: list[Labelled]) -> None:
        """Look at images that the backbone takes as they are."""
        if self._backbone() is None or self._transform(augment=False) is not None:
            return
        if self.augment and any(samples.features is None for samples in parts):
            raise UserError(
                "data.augment=true needs random transforms, and model.init_args.backbone has none; leave it out, or "
                "give mh_lightning.backbones.ModuleBackbone with an image_size."
            )
        check_image_sizes(parts)

    def _cut(self) -> None:
        data = self.load()
        for split in SPLIT_NAMES:
            read: Labelled | None = getattr(data, split)
            if read is not None:
                check_labels(read.labels, len(data.class_names), split)
                check_finite(read.inputs, split)
        splits = split_as_asked(
            data,
            self.perturbations,
            validation_fraction=self.validation_fraction,
            split_fractions=self.split_fractions,
            validation_tasks=self.validation_tasks,
            split_seed=self.split_seed,
            max_train_samples=self.max_train_samples,
            max_test_samples=self.max_test_samples,
        )
        groups = class_groups(
            len(data.class_names),
            self.increment,
            self.first_task_size,
            self.class_order,
            self.class_order_seed,
            self.last_task_size,
        )
        if self.imbalance_ratio > 1:
            kept = long_tailed(splits["train"].labels, self.imbalance_ratio, self._draws(1))
            splits["train"] = splits["train"].take(kept)
        if self.label_noise:
            together = groups if self.scenario in ("CI", "CDI", "CDID") else [[*range(len(data.class_names))]]
            labels = with_label_noise(splits["train"].labels, together, self.label_noise, self._draws(2))
            splits["train"] = splits["train"]._replace(labels=labels)
        if self.blurry_borders is not None:
            groups = self.blurry_borders.class_groups(groups, self._draws(0))
        self.class_names = self._own_class_names = data.class_names
        if self._known is not None:
            self.class_names, numbers = joined_classes(self._known.class_names, data.class_names)
            splits = {split: samples._replace(labels=numbers[samples.labels]) for split, samples in splits.items()}
            groups = [numbers[group].tolist() for group in groups]
        self.tasks, self._splits, self._samples_of_tasks = cut_into_tasks(
            self.scenario, groups, splits, self.class_names, self.validation_tasks
        )
        if self.blurry_borders is not None:
            parts = self._samples_of_tasks["train"]
            labels = self._splits["train"].labels
            self._samples_of_tasks["train"] = blurred(self.blurry_borders, labels, parts, self._draws(3))
        self._task_of_sample = {
            split: task_of_samples(parts, len(self._splits[split].labels))
            for split, parts in self._samples_of_tasks.items()
        }

    def _draws(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.split_seed, purpose])

    def _features(self, split: str, augment: bool) -> StoredFeatures:
        backbone = self._backbone()
        if self.trainer is None or backbone is None or self._kept is None:
            raise UserError("data.feature_cache needs a trainer and a method with a backbone.")
        return self._kept.of(
            split,
            self._splits[split],
            backbone,
            self._transform(augment),
            augment,
            self.trainer,
            self.perturbations,
            self._perturbation_seed(split),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's training samples, in a random order that depends on the global seed and the epoch."""
        task = self.task_of_epoch(self.trainer.current_epoch) if self.trainer else 0
        ranks = self.trainer.world_size if self.trainer else 1
        if self.chunk_size is not None and ranks > 1:
            raise UserError(f"data.chunk_size is for one device, the trainer has {ranks}; leave it out.")
        epoch = self.trainer.current_epoch if self.trainer else 0
        seed = seed_from(self._epochs_before() + epoch)
        indices = self._samples_of_tasks["train"][task]
        if self.scenario != "CDID":
            return self._loader(
                "train", indices, self.chunk_size or self.batch_size, seed, True, self.augment, self.batches_done
            )
        features = self._splits["train"].features
        assert features is not None
        drifting = np.argsort(features[indices].flatten(1)[:, 0].numpy(), kind="stable")
        return self._loader(
            "train", indices[drifting], self.chunk_size or self.batch_size, None, True, self.augment, self.batches_done
        )

    def joint_train_dataloader(self, task: int, epoch: int, batch_size: int | None = None) -> DataLoader[Any]:
        """The training samples of the first tasks up to `task`, together in a random order that depends on the global
        seed, the task and the epoch; in batches of `batch_size`, by default the stream's.
        """
        indices = np.concatenate(self._samples_of_tasks["train"][: task + 1])
        size = batch_size or self.batch_size
        return self._loader("train", indices, size, seed_from(task, epoch), True, self.augment)

    def unaugmented_train_dataloader(self, task: int, places: NDArray[np.int64] | None = None) -> DataLoader[Any]:
        """A task's training samples, each once, in the data's order and with the transform of evaluation; or those at
        some places among them.
        """
        indices = self._samples_of_tasks["train"][task]
        return self._loader("train", indices if places is None else indices[places], self.eval_batch_size)

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
        self,
        split: str,
        indices: NDArray[np.int64],
        batch_size: int,
        seed: int | None = None,
        even: bool = False,
        augment: bool = False,
        first_batch: int = 0,
    ) -> DataLoader[Any]:
        dataset = self._dataset(split, indices, self._task_of_sample[split][indices], augment, seed)
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = StreamBatchSampler(len(dataset), batch_size, seed, even, rank, ranks, first_batch)
        # the loader's own generator seeds the workers, and leaves the global one alone
        generator = torch.Generator().manual_seed(seed or 0)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=0 if self._kept is not None else self.num_workers,
            generator=generator,
            collate_fn=already_collated,
        )

    def _dataset(
        self,
        split: str,
        indices: NDArray[np.int64],
        tasks: NDArray[np.int64],
        augment: bool = False,
        seed: int | None = None,
    ) -> StreamDataset:
        samples = self._splits[split]
        if self._kept is not None:
            stored = self._features(split, augment).one_view_each(seed)
            return StreamDataset(Labelled(stored, samples.labels).take(indices), tasks)
        transform = self._transform(augment)
        return StreamDataset(
            samples.take(indices),
            tasks,
            transform,
            self.perturbations,
            self._perturbation_seed(split),
            seed if augment else None,
        )

    def first_input(self) -> Tensor:
        """The first test sample as a batch of one, to try a model on."""
        first = np.zeros(1, dtype=np.int64)
        return self._dataset("test", first, first)[0][0].unsqueeze(0)

    def evaluation_batch(self, split: str, batch_idx: int) -> list[int]:
        """Places in the data of the samples of this rank's evaluation batch."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        start = batch_idx * self.eval_batch_size
        stop = min(start + self.eval_batch_size, len(self._splits[split].labels))
        return list(range(start + rank, stop, ranks))

    def samples_to_show(self, split: str, task: int, count: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The first samples of a task before any transform, and their classes (count,): images
        (count, height, width, 3) of type uint8, all scaled to one size, or features (samples, ...), of which none is
        left out if they are points of a plane.
        """
        indices = self._samples_of_tasks[split][task]
        samples = self._splits[split].take(indices if self.is_plane() else indices[:count])
        if samples.features is not None:
            return samples.features.numpy(), samples.labels
        return small_pictures(samples, self.perturbations, self._perturbation_seed(split)), samples.labels

    def is_plane(self) -> bool:
        """Whether the samples are points (x, y)."""
        features = self._splits["train"].features
        return features is not None and features.shape[1:] == (2,)

    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a plane's training samples, with a margin."""
        features = self._splits["train"].features
        assert features is not None
        return extent_of_points(features)

    def _perturbation_seed(self, split: str) -> tuple[int, int]:
        return self.split_seed, SPLIT_NAMES.index(split)

    def _backbone(self) -> Backbone | None:
        backbone = getattr(self.trainer.lightning_module, "backbone", None) if self.trainer else None
        return backbone if isinstance(backbone, Backbone) else None

    def _transform(self, augment: bool) -> Callable[[Any], Tensor] | None:
        backbone = self._backbone()
        if backbone is None:
            return None
        return image_transform(self.image_transforms, backbone, augment, self.published_normalization)

    def learnt(self) -> LearntStream:
        """What a model keeps of it."""
        return LearntStream(
            self.class_names,
            [*(self._known.class_groups if self._known else []), *self.class_groups],
            self.scenario,
            self.image_transforms,
            self.published_normalization,
            self._splits["train"].reading,
            self._epochs_before() + (self.trainer.current_epoch + 1 if self.trainer else 0),
            self.num_earlier_tasks + self.task_of_epoch(self.trainer.current_epoch) + 1 if self.trainer else None,
        )

    @property
    def num_earlier_tasks(self) -> int:
        """Tasks that the model had learnt from other streams, if it goes on."""
        return 0 if self._known is None else len(self._known.class_groups)

    def _epochs_before(self) -> int:
        return 0 if self._known is None else self._known.epochs

    def state_dict(self) -> dict[str, Any]:
        """What makes the stream, kept in checkpoints so that none can be resumed on another one."""
        return {
            "class_groups": self.class_groups,
            GOES_ON: {"tasks": self.num_earlier_tasks, "epochs": self._epochs_before()},
            **{name: getattr(self, name) for name in self.split_options + ORDER_OPTIONS},
            "blurry_borders": self.blurry_borders and repr(self.blurry_borders),
            "perturbations": [repr(perturbation) for perturbation in self.perturbations],
            "feature_cache": self.feature_cache and f"{self.feature_cache.dtype}, {self.feature_cache.views} views",
            "seed_everything": None if (seed := global_seed()) is None else str(seed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's stream with this one: all of it to train on, what splits the data to evaluate.

        Raises:
            UserError: if they differ.
        """
        training = self.trainer is None or self.trainer.state.fn == "fit"
        names = None if training else ("class_groups", *self.split_options)
        check_same_stream(state_dict, self.state_dict(), names)
