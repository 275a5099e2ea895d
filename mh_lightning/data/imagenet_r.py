"""ImageNet-R: 30,000 renditions (art, cartoons, toys, ...) of 200 classes of ImageNet (Hendrycks et al. 2021)."""

from typing import Any, ClassVar

from mh_lightning.data.archived_images import UnsplitImages
from mh_lightning.data.transforms import ImageTransforms


class ImageNetR(UnsplitImages):
    """Stream of ImageNet-R. It is published without a split; by default 24,000 images train and 6,000 test, as in
    class-incremental experiments, but drawn anew. To use the list of one of them, put its images into ``root/train``
    and ``root/test``.

    Args:
        root: folder of ``imagenet-r.tar``, which is unpacked there, or of its folder ``imagenet-r``; or of images in
            ``root/train/<class>/...`` and ``root/test/<class>/...``. Classes are in the order of their WordNet
            numbers.
        test_fraction: part in (0, 1) of the images of each class that is the test set: always the same random ones.
        check_images: decode each image once before training, so that an unreadable one is named at the start.
        image_transforms: by default those of published class-incremental experiments; "backbone" for its own. See
            `StreamDataModule`.
        stream_options: options of `StreamDataModule`.
    """

    official = "imagenet-r.tar or its folder imagenet-r"
    archives: ClassVar = {"imagenet-r": ("imagenet-r.tar",)}
    images = "imagenet-r"

    def __init__(
        self,
        root: str,
        test_fraction: float = 0.2,
        check_images: bool = True,
        image_transforms: ImageTransforms = "random_resized_crop",
        **stream_options: Any,
    ) -> None:
        super().__init__(
            root=root,
            test_fraction=test_fraction,
            check_images=check_images,
            image_transforms=image_transforms,
            **stream_options,
        )
