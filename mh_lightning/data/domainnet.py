"""DomainNet's sketches: 345 classes (Peng et al. 2019)."""

from pathlib import Path
from typing import Any, ClassVar

from mh_lightning.data.archived_images import ArchivedImages, listed_images, reading
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError


class DomainNetSketch(ArchivedImages):
    """Stream of the domain "sketch" of DomainNet, with its own split.

    Args:
        root: folder of ``sketch.zip``, which is unpacked there, or of its folder ``sketch``, with the lists
            ``sketch_train.txt`` and ``sketch_test.txt``; or of images in ``root/train/<class>/...`` and
            ``root/test/<class>/...``.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = "sketch.zip or its folder sketch, sketch_train.txt and sketch_test.txt"
    archives: ClassVar = {"sketch": ("sketch.zip",)}

    def __init__(
        self,
        root: str,
        check_images: bool = True,
        image_transforms: ImageTransforms = "random_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(root=root, check_images=check_images, image_transforms=image_transforms, **stream_options)

    def read(self) -> tuple[Labelled, Labelled, list[str]]:
        """Read the lists; classes have the names of their folders."""
        self.needed("sketch")
        sources = [self.needed(f"sketch_{split}.txt") for split in ("train", "test")]
        lists = [_listed(source) for source in sources]
        folder_of: dict[int, str] = {}
        for source, listed in zip(sources, lists, strict=True):
            for name, label in listed:
                folder = Path(name).parent.name
                if folder_of.setdefault(label, folder) != folder:
                    raise UserError(
                        f"data.root: {str(source)!r} gives number {label} to the class {folder!r}, but "
                        f"{folder_of[label]!r} has it; fetch both lists again."
                    )
        names = [folder_of[label] for label in sorted(folder_of)]
        train, test = (
            listed_images(self.folder, listed, names, source) for source, listed in zip(sources, lists, strict=True)
        )
        return train, test, names


def _listed(source: Path) -> list[tuple[str, int]]:
    with reading(source):
        lines = (line.rpartition(" ") for line in source.read_text(encoding="utf-8").splitlines() if line.strip())
        listed = [(name, int(label)) for name, _, label in lines]
        if not listed:
            raise ValueError("it lists no image")
        return listed
