"""Transforms of images: those of the backbone, or those of published class-incremental experiments."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mh_lightning.backbones import Backbone
from mh_lightning.errors import UserError

ImageTransforms = Literal["backbone", "random_resized_crop", "jittered_random_resized_crop", "random_crop"]


class Normalization(NamedTuple):
    """Of images: each channel minus its mean and over its standard deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
JITTER = 63 / 255  # of the brightness
RESIZED_FOR_TEST = 256 / 224  # of the image size
RESIZED_FOR_CROP = 300 / 224


def image_transform(
    kind: ImageTransforms, backbone: Backbone, augment: bool, published: Normalization | None = None
) -> Callable[[Any], Tensor] | None:
    """What turns a PIL image into the backbone's input, or None if its inputs need nothing.

    Args:
        kind: "backbone" for its own transforms. Otherwise published ones, at the backbone's image size s, all bicubic:
            evaluation resizes the shorter side to s * 256/224 and cuts the
            centre; training is "random_resized_crop", the same with the brightness jittered by 63/255, or
            "random_crop" from the image resized to a square of s * 300/224; all with a random horizontal flip.
        backbone: whose input is wanted.
        augment: the random transform of training instead of that of evaluation.
        published: normalization of the published transforms, by default that of the backbone.

    Raises:
        UserError: if the backbone takes no images.

    Source: Zhang et al., "SLCA", ICCV 2023, and its code.
    """
    if kind == "backbone":
        return backbone.transform(augment)
    images = backbone.image_format()
    if images is None:
        raise UserError(f"data.image_transforms={kind} needs a backbone that takes images; leave it out.")
    size, bicubic = images.size, InterpolationMode.BICUBIC
    if not augment:
        steps = [transforms.Resize(round(size * RESIZED_FOR_TEST), bicubic), transforms.CenterCrop(size)]
    elif kind == "random_crop":
        side = round(size * RESIZED_FOR_CROP)
        steps = [transforms.Resize((side, side), bicubic), transforms.RandomCrop(size)]
    else:
        steps = [transforms.RandomResizedCrop(size, interpolation=bicubic)]
    if augment:
        steps.append(transforms.RandomHorizontalFlip())
        if kind == "jittered_random_resized_crop":
            steps.append(transforms.ColorJitter(brightness=JITTER))
    whole: Callable[[Any], Tensor] = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(*(published or images[1:]))]
    )
    return whole
