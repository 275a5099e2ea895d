"""Stanford Cars: 16,185 photographs of 196 models of cars (Krause et al. 2013)."""

from pathlib import Path
from typing import Any, ClassVar

from mh_lightning.data.archived_images import ArchivedImages, listed_images, reading
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.mat_files import read_mat_table, rows_of
from mh_lightning.data.transforms import ImageTransforms


class Cars196(ArchivedImages):
    """Stream of Stanford Cars, with its own split into 8,144 training and 8,041 test images.

    Args:
        root: folder of ``cars_train.tgz``, ``cars_test.tgz`` and ``car_devkit.tgz``, which are unpacked there, or of
            their folders ``cars_train``, ``cars_test`` and ``devkit``, with ``cars_test_annos_withlabels.mat`` there
            or in ``devkit``; or of images in ``root/train/<class>/...`` and ``root/test/<class>/...``.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = "cars_train.tgz, cars_test.tgz, car_devkit.tgz (or their folders) and cars_test_annos_withlabels.mat"
    archives: ClassVar = {
        "cars_train": ("cars_train.tgz",),
        "cars_test": ("cars_test.tgz",),
        "devkit": ("car_devkit.tgz",),
    }

    def __init__(
        self,
        root: str,
        check_images: bool = True,
        image_transforms: ImageTransforms = "random_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """Read the annotations."""
        train, test, devkit = (self.needed(folder) for folder in self.archives)
        tables = [self.needed(f"devkit/{name}.mat") for name in ("cars_meta", "cars_train_annos")]
        labels_of_test = "cars_test_annos_withlabels.mat"
        beside = devkit / labels_of_test
        test_table = beside if beside.is_file() else self.needed(labels_of_test)
        names = [str(name) for name in read_mat_table(tables[0], "class_names")]
        return _annotated(train, tables[1], names), _annotated(test, test_table, names), names


def _annotated(folder: Path, table: Path, names: list[str]) -> Labelled:
    rows = rows_of(table, "annotations", "fname", "class")
    with reading(table):
        listed = [(str(name), int(number) - 1) for name, number in rows]
    return listed_images(folder, listed, names, table)
