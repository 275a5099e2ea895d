"""CUB-200-2011: 11,788 photographs of birds, 200 species (Wah et al. 2011)."""

from pathlib import Path
from typing import Any, ClassVar

from mh_lightning.data.archived_images import ArchivedImages, listed_images, reading
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError

FOLDER = "CUB_200_2011"


class CUB200(ArchivedImages):
    """Stream of CUB-200-2011, with its own split into 5,994 training and 5,794 test images.

    Args:
        root: folder of ``CUB_200_2011.tgz``, which is unpacked there, or of its folder ``CUB_200_2011``; or of images
            in ``root/train/<class>/...`` and ``root/test/<class>/...``.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = f"{FOLDER}.tgz or its folder {FOLDER}"
    archives: ClassVar = {FOLDER: (f"{FOLDER}.tgz",)}

    def __init__(
        self,
        root: str,
        check_images: bool = True,
        image_transforms: ImageTransforms = "random_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """Read the lists."""
        self.needed(FOLDER)
        images, labels, parts, classes = (
            self.needed(f"{FOLDER}/{name}.txt")
            for name in ("images", "image_class_labels", "train_test_split", "classes")
        )
        path_of, class_of, is_training, name_of = map(_numbered, (images, labels, parts, classes))
        for other, path in ((class_of, labels), (is_training, parts)):
            differ = path_of.keys() ^ other.keys()
            if differ:
                raise UserError(
                    f"data.root: image number {min(differ)} is in one of {str(images)!r} and {str(path)!r} only; fetch "
                    "the archive again."
                )
        order = {number: label for label, number in enumerate(name_of)}
        listed: dict[str, list[tuple[str, int]]] = {"1": [], "0": []}
        for image, path_in_folder in path_of.items():
            with reading(labels):
                label = order.get(int(class_of[image]), -1)
            with reading(parts):
                listed[is_training[image]].append((path_in_folder, label))
        train, test = (
            listed_images(self.folder / FOLDER / "images", part, list(name_of.values()), images)
            for part in listed.values()
        )
        return train, test, list(name_of.values())


def _numbered(path: Path) -> dict[int, str]:
    """What each line of a file says about its number."""
    with reading(path):
        lines = (line.strip().partition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        return {int(number): text.strip() for number, _, text in lines}
