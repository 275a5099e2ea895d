"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation images, 1000 classes (Russakovsky et al. 2015)."""

from typing import Any, ClassVar

import numpy as np

from mh_lightning.data.archived_images import ArchivedImages, listed_images, reading
from mh_lightning.data.archives import unpack, unpack_each
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.listing import is_hidden, list_images
from mh_lightning.data.mat_files import rows_of
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError

TRAIN, VALIDATION, DEVKIT = "ILSVRC2012_img_train", "ILSVRC2012_img_val", "ILSVRC2012_devkit_t12"
PUBLISHED_SEED = 1993  # of the class orders of published experiments
SUBSET = 100


class ImageNet1000(ArchivedImages):
    """Stream of ImageNet; the validation images are the test set. Classes are WordNet numbers in alphabetical order.

    Args:
        root: folder of ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and ``ILSVRC2012_devkit_t12.tar.gz``,
            which are unpacked there into folders of these names; or of images in ``root/train/<class>/...`` and
            ``root/test/<class>/...``, which may be links to folders elsewhere.
        check_images: decode each image once before training, so that an unreadable one is named at the start; that
            takes its time.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = f"{TRAIN}.tar, {VALIDATION}.tar and {DEVKIT}.tar.gz"
    archives: ClassVar = {TRAIN: (f"{TRAIN}.tar",), VALIDATION: (f"{VALIDATION}.tar",), DEVKIT: (f"{DEVKIT}.tar.gz",)}

    def __init__(
        self,
        root: str,
        check_images: bool = False,
        image_transforms: ImageTransforms = "jittered_random_resized_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)

    def unpack(self) -> None:
        """Unpack the lists, the validation images, and the training images of the classes that are used."""
        train, validation, devkit = (self.archive_of(folder) for folder in self.archives)
        if devkit is not None:
            unpack(devkit, self.folder / DEVKIT)
        if validation is not None:
            unpack(validation, self.folder / VALIDATION, flat=True)
        if train is not None:
            unpack_each(train, self.folder / TRAIN, self.choose_classes(sorted(self._class_of_number().values())))

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """List the training images, and read the classes of the validation images."""
        train, validation, _ = (self.needed(folder) for folder in self.archives)
        class_of = self._class_of_number()
        names = self.choose_classes(sorted(class_of.values()))
        truth = self.needed(f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt")
        with reading(truth):
            numbers = [int(line) for line in truth.read_text().split()]
        images = sum(path.suffix == ".JPEG" and not is_hidden(path.name) for path in validation.iterdir())
        if images != len(numbers) or not set(numbers) <= class_of.keys():
            raise UserError(
                f"data.root: {str(truth)!r} must hold the number of a class for each of the {images} images in "
                f"{str(validation)!r}, got {len(numbers)} numbers from {min(numbers, default=0)} to "
                f"{max(numbers, default=0)}; fetch both archives again."
            )
        label_of = {name: label for label, name in enumerate(names)}
        listed = [
            (f"ILSVRC2012_val_{place:08d}.JPEG", label_of[class_of[number]])
            for place, number in enumerate(numbers, start=1)
            if class_of[number] in label_of
        ]
        return list_images([train], names)[0], listed_images(validation, listed, names, truth), names

    def _class_of_number(self) -> dict[int, str]:
        """The WordNet number of each number in the list of validation images; parents of classes have none there."""
        self.needed(DEVKIT)
        path = self.needed(f"{DEVKIT}/data/meta.mat")
        rows = rows_of(path, "synsets", "ILSVRC2012_ID", "WNID", "num_children")
        with reading(path):
            return {int(number): str(name) for number, name, children in rows if int(children) == 0}


class ImageNet100(ImageNet1000):
    """Stream of 100 classes of ImageNet, from the archives or folders of `ImageNet1000`, of which only these are
    unpacked. Published lists differ; give your own as `classes`, or as the folders in ``root/train`` and ``root/test``.

    Args:
        root: as for `ImageNet1000`.
        classes: names of the classes that are used, by default the first 100 of all in alphabetical order permuted by
            ``numpy.random.RandomState(1993)``. Their order in the stream is the alphabetical one.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.

    Example:
        >>> ImageNet100("data/imagenet", classes=["n02", "n01"]).choose_classes(["n01", "n02", "n03"])
        ['n01', 'n02']
        >>> chosen = ImageNet100("data/imagenet").choose_classes([f"{number:03d}" for number in range(1000)])
        >>> len(chosen), chosen[:4]
        (100, ['007', '011', '014', '044'])
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        check_images: bool = True,
        image_transforms: ImageTransforms = "jittered_random_resized_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)
        self.classes = classes

    def choose_classes(self, names: list[str]) -> list[str]:
        """Those that were asked for, or else the 100.

        Raises:
            UserError: if one that was asked for is not there.
        """
        if self.classes is None:
            order = np.random.RandomState(PUBLISHED_SEED).permutation(len(names))
            return sorted(names[place] for place in order[:SUBSET])
        unknown = sorted(set(self.classes) - set(names))
        if unknown or not self.classes:
            raise UserError(
                f"data.classes must be names of the {len(names)} classes, such as {names[0]}, got {unknown[:1]}."
            )
        return sorted(set(self.classes))
