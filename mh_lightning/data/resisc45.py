"""NWPU-RESISC45: 31,500 satellite images of 256 x 256 pixels, 45 classes (Cheng, Han, Lu 2017)."""

from typing import Any, ClassVar

from mh_lightning.data.archived_images import UnsplitImages
from mh_lightning.data.transforms import ImageTransforms
from mh_lightning.errors import UserError


class RESISC45(UnsplitImages):
    """Stream of NWPU-RESISC45. It is published without a split; by default a fifth of the images of each class, drawn
    here, is the test set. To use a published list, put its images into ``root/train`` and ``root/test``.

    Args:
        root: folder of ``NWPU-RESISC45`` with a folder for each class, or of an archive of it (.zip, .tar, .tar.gz),
            which is unpacked there; or of images in ``root/train/<class>/...`` and ``root/test/<class>/...``. The
            official .rar is to be unpacked by hand. Classes are in alphabetical order.
        test_fraction: part in (0, 1) of the images of each class that is the test set: always the same random ones.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = "the folder NWPU-RESISC45 or an archive NWPU-RESISC45.zip, .tar or .tar.gz"
    archives: ClassVar = {"NWPU-RESISC45": tuple(f"NWPU-RESISC45{suffix}" for suffix in (".zip", ".tar", ".tar.gz"))}
    images = "NWPU-RESISC45"

    def __init__(
        self,
        root: str,
        test_fraction: float = 0.2,
        check_images: bool = True,
        image_transforms: ImageTransforms = "random_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(
            root=root,
            test_fraction=test_fraction,
            check_images=check_images,
            image_transforms=image_transforms,
            **stream_options,
        )

    def unpack(self) -> None:
        """Unpack the archive.

        Raises:
            UserError: also if there is only a .rar, which Python cannot unpack.
        """
        super().unpack()
        if not (self.folder / self.images).is_dir() and (self.folder / f"{self.images}.rar").is_file():
            raise UserError(
                f"data.root={self.root!r}: {self.images}.rar cannot be unpacked here; unpack it by hand, with unrar or "
                f"7-Zip, so that the folder {self.images} is next to it."
            )
