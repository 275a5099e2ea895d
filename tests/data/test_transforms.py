"""Published transforms, against their description."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mh_lightning.backbones import Identity, TimmBackbone
from mh_lightning.data import Digits
from mh_lightning.data.transforms import IMAGENET, ImageTransforms, image_transform
from mh_lightning.errors import UserError


@pytest.fixture(scope="module")
def backbone() -> TimmBackbone:
    return TimmBackbone("test_vit", image_size=160)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


KINDS = [kind for kind in get_args(ImageTransforms) if kind != "backbone"]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_a_bicubic_centre_crop(
    backbone: TimmBackbone, picture: Image.Image, kind: ImageTransforms
) -> None:
    transform = image_transform(kind, backbone, augment=False)
    assert transform is not None
    resized = picture.resize((274, 183), Image.Resampling.BICUBIC)  # 160 * 256 / 224, the shorter side
    left, top = round((274 - 160) / 2), round((183 - 160) / 2)
    expected = transforms.functional.to_tensor(resized.crop((left, top, left + 160, top + 160)))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in backbone.image_format()[1:])
    torch.testing.assert_close(transform(picture), (expected - mean) / std)


def test_published_normalization(backbone: TimmBackbone, picture: Image.Image) -> None:
    own, published = (image_transform("random_crop", backbone, False, one) for one in (None, IMAGENET))
    assert own is not None and published is not None
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in backbone.image_format()[1:])
    other_mean, other_std = (torch.tensor(part).view(3, 1, 1) for part in IMAGENET)
    torch.testing.assert_close(published(picture) * other_std + other_mean, own(picture) * std + mean)


def steps_of(kind: ImageTransforms, backbone: TimmBackbone) -> list[str]:
    transform = image_transform(kind, backbone, augment=True)
    assert isinstance(transform, transforms.Compose)
    assert all(getattr(step, "interpolation", transforms.InterpolationMode.BICUBIC).value == "bicubic"
               for step in transform.transforms)  # fmt: skip
    return [type(step).__name__ for step in transform.transforms[:-2]]


def test_training_transforms(backbone: TimmBackbone, picture: Image.Image) -> None:
    assert steps_of("random_resized_crop", backbone) == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert steps_of("jittered_random_resized_crop", backbone)[2:] == ["ColorJitter"]
    assert steps_of("random_crop", backbone) == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    for kind in KINDS:
        transform = image_transform(kind, backbone, augment=True)
        assert transform is not None
        first, second = transform(picture), transform(picture)
        assert first.shape == (3, 160, 160) and not torch.equal(first, second)
    resize = image_transform("random_crop", backbone, augment=True).transforms[0]  # type: ignore[union-attr]
    assert resize.size == (214, 214)  # 160 * 300 / 224


def test_backbones_own_transform(backbone: TimmBackbone) -> None:
    assert repr(image_transform("backbone", backbone, False)) == repr(backbone.transform(False))
    assert image_transform("backbone", Identity(3), True) is None


def test_features_have_no_published_transform() -> None:
    with pytest.raises(UserError, match=r"data.image_transforms=random_crop needs a backbone that takes images"):
        image_transform("random_crop", Identity(3), False)


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match=r"data.image_transforms must be one of backbone, .*got 'crop'"):
        Digits(image_transforms="crop")
