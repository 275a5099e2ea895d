"""Any module as a backbone, from Python and from a configuration; what does not fit gets one sentence."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn

from mh_lightning.backbones import Backbone, ModuleBackbone, as_backbone
from mh_lightning.callbacks import TaskBoundaries
from mh_lightning.data import ImageFolder, Tensors
from mh_lightning.data.features import FeatureCache
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import (
    ClosedForm,
    ContinualMethod,
    ExperienceReplay,
    FineTuning,
)
from tests.conftest import results_of, weights_of
from tests.data.refusal import refused, refused_stream

Run = Callable[..., Path]
SIDE = 6


class Moody(nn.Module):
    """Everything that a forward can leave a trace in."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.replaced = self.replaced + 1
        noise = torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002
        return self.norm(self.convolution(x)).amax(dim=(2, 3)) + 0 * noise.to(x.dtype)


class Small(nn.Sequential):
    """A convolution and its norm."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


class Returns(nn.Module):
    """Gives something of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Dictionary(Backbone):
    """A backbone of one's own that forgets what it should give."""

    num_features = 3

    def forward(self, x: Tensor) -> Any:
        return {"features": x}


def images(**options: Any) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(4).repeat(4)
    return Tensors(pixels, labels, pixels[:8], labels[:8], increment=2, batch_size=8, **options)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, max_epochs=-1, reload_dataloaders_every_n_epochs=1,
                   num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder,
                   callbacks=[TaskBoundaries()], **options)  # fmt: skip


def fit(method: ContinualMethod, data: Any, folder: Path) -> ContinualMethod:
    trainer(folder).fit(method, datamodule=data)
    return method


# --- the width of the features


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (nn.Flatten(), 3 * SIDE * SIDE),
        (nn.Identity(), 3 * SIDE * SIDE),
        (nn.Conv2d(3, 2, 3), 2 * 4 * 4),
        (Moody(), 5),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(7)), 7),
        (Returns(lambda x: x.mean(dim=(1, 2, 3))), 1),
        (Returns(lambda x: x.mean(dim=(2, 3)).squeeze()), 3),  # loses the batch of one
        (Returns(lambda x: x.flatten(1).double()), 3 * SIDE * SIDE),
    ],
)
def test_the_width_is_found(module: nn.Module, width: int, tmp_path: Path) -> None:
    backbone = as_backbone(module)
    backbone.prepare(torch.rand(1, 3, SIDE, SIDE))
    assert backbone.num_features == width
    for rows in (1, 2, 5):
        assert backbone.eval()(torch.rand(rows, 3, SIDE, SIDE)).shape == (rows, width)


def test_finding_the_width_leaves_no_trace() -> None:
    module = Moody().train()
    module.norm.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    expected = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    backbone = as_backbone(module)
    backbone.prepare(torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]  # noqa: NPY002
    assert [part.training for part in module.modules()] == modes and modes[0]
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and before.keys() == after.keys()
    assert backbone.num_features == 5


def test_backbones_stay_what_they_are() -> None:
    backbone = Dictionary()
    assert as_backbone(backbone) is backbone
    refused(lambda: as_backbone(torch.relu), "model.init_args.backbone", "torch.nn.Module", "builtin_function")  # type: ignore[arg-type]
    refused(lambda: FineTuning("resnet18", nn.Linear), "model.init_args.backbone", "got a str")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda x: {"logits": x, "loss": 1}, ["a dict with 'logits', 'loss'", "forward returns that tensor"]),
        (lambda x: (x, x), ["a tuple"]),
        (lambda x: None, ["a NoneType"]),
        (lambda x: x.flatten(1).long(), ["a tensor of int64"]),
        (lambda x: torch.complex(x, x), ["a tensor of complex64"]),
        (lambda x: x.mean(), ["shape ()"]),
        (lambda x: x.flatten(1).T, ["shape"]),
        (lambda x: x.flatten(1)[:, :0], ["shape"]),
        (lambda x: x @ torch.ones(7, 7), ["first sample, of shape (3, 6, 6)", "RuntimeError"]),
        (lambda x: x.pixel_values, ["first sample", "AttributeError"]),
        (lambda x: x["pixels"], ["first sample", "IndexError"]),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_what_gives_no_features_is_refused_before_training(
    make: Callable[[Tensor], Any], parts: list[str], kept: bool, tmp_path: Path
) -> None:
    data = images(feature_cache=FeatureCache(str(tmp_path)) if kept else None)
    method = FineTuning(Returns(make), nn.Linear, partial(torch.optim.SGD, lr=0.1))
    refused(lambda: fit(method, data, tmp_path), "model.init_args.backbone: tests.test_plain_modules.Returns", *parts)
    assert method.global_step == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_a_backbone_of_ones_own_that_gives_no_features(tmp_path: Path) -> None:
    method = FineTuning(Dictionary(), nn.Linear)
    refused(lambda: fit(method, images(), tmp_path), "model.init_args.backbone gives a dict with 'features'")

    class Wide(Dictionary):
        def forward(self, x: Tensor) -> Any:
            return x.flatten(1)

    refused(lambda: fit(FineTuning(Wide(), nn.Linear), images(), tmp_path), "shape (1, 108)", "(1, 3)")


def test_a_module_without_forward(tmp_path: Path) -> None:
    refused(lambda: fit(FineTuning(nn.Module(), nn.Linear), images(), tmp_path), "first sample", "forward")


# --- runs


@pytest.mark.parametrize("kind", ["FineTuning", "ExperienceReplay", "ClosedForm"])
def test_a_plain_module_learns_as_a_backbone_does(kind: str, tmp_path: Path) -> None:
    class Written(Backbone):
        """What it takes without `ModuleBackbone`."""

        num_features = 5

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.module(x)
            return out

    def method(backbone: nn.Module) -> ContinualMethod:
        sgd = partial(torch.optim.SGD, lr=0.1)
        if kind == "ClosedForm":
            return ClosedForm(backbone.requires_grad_(False), ClassMeans)
        if kind == "ExperienceReplay":
            return ExperienceReplay(backbone, nn.Linear, buffer_size=4, optimizer=sgd)
        return FineTuning(backbone, nn.Linear, sgd)

    weights = []
    for wrap in (lambda module: module, Written):
        torch.manual_seed(0)
        made = fit(method(wrap(Moody())), images(), tmp_path)
        weights.append({name: value for name, value in made.state_dict().items() if "seen" not in name})
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        if "replaced" not in name:
            assert torch.equal(value, weights[1][name]), name


def test_kept_features_of_a_frozen_module(tmp_path: Path) -> None:
    def frozen() -> ModuleBackbone:
        torch.manual_seed(0)
        return ModuleBackbone(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), frozen=True)

    weights = []
    for cache in (None, FeatureCache(str(tmp_path / "kept")), FeatureCache(str(tmp_path / "kept"))):
        backbone = frozen()
        torch.manual_seed(1)
        method = fit(FineTuning(backbone, nn.Linear, partial(torch.optim.SGD, lr=0.1)),
                     images(feature_cache=cache), tmp_path)  # fmt: skip
        weights.append(method.state_dict())
        trainer(tmp_path).test(method, datamodule=images(feature_cache=cache), verbose=False)
    assert len(list((tmp_path / "kept").iterdir())) == 1  # whether the width was known or not
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)
        assert torch.equal(weights[1][name], weights[2][name])
    plain = FineTuning(frozen().module.requires_grad_(True), nn.Linear)
    refused(lambda: fit(plain, images(feature_cache=FeatureCache(str(tmp_path))), tmp_path), "frozen=true",
            "mh_lightning.backbones.ModuleBackbone")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"learning_rate_factor": -0.1}, ["backbone.learning_rate_factor", "at least 0"]),
        ({"learning_rate_factor": 0.1, "frozen": True}, ["backbone.learning_rate_factor=0.1", "frozen=false"]),
        ({"weight_decay": 0.1, "frozen": True}, ["backbone.weight_decay=0.1", "frozen=false"]),
        ({"image_size": 0}, ["backbone.image_size", "0"]),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], parts: list[str]) -> None:
    refused(lambda: ModuleBackbone(Moody(), **options), *parts)


def test_options_of_training() -> None:
    backbone = ModuleBackbone(Moody(), learning_rate_factor=0.1, weight_decay=0.2, frozen_batch_norm=True)
    (group,) = backbone.parameter_groups()
    assert (group.learning_rate_factor, group.weight_decay, len(group.parameters)) == (0.1, 0.2, 4)
    assert backbone.optimizer_settings() == {"learning_rate_factor": 0.1, "weight_decay": 0.2}
    assert not backbone.module.norm.training and backbone.module.training
    frozen = ModuleBackbone(Moody(), frozen=True, normalize_features=True)
    assert not any(part.training for part in frozen.train().modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    norms = frozen(torch.rand(2, 3, SIDE, SIDE)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))


# --- images of different sizes


def write_images(root: Path, sizes: list[tuple[int, int]], orientation: int = 1) -> Path:
    """A train and a test image of each of two classes for each size."""
    for split in ("train", "test"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for place, size in enumerate(sizes):
                image = Image.new("RGB", size, (20 * place, 100, 0))
                exif = image.getexif()
                exif[0x0112] = orientation
                image.save(root / split / name / f"{place}.jpg", exif=exif)
    return root


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), increment=1, batch_size=2, **options)


@pytest.mark.parametrize("cached", [False, True])
def test_images_of_different_sizes(cached: bool, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", [(8, 8), (8, 8), (8, 9)])
    options = {"feature_cache": FeatureCache(str(tmp_path / "kept"))} if cached else {}
    refused(lambda: fit(FineTuning(nn.Flatten(), nn.Linear), folder(root, **options), tmp_path),
            "8 x 8 pixels", "8 x 9 pixels", "2.jpg", "no transform", "image_size")  # fmt: skip
    method = FineTuning(ModuleBackbone(nn.Flatten(), image_size=4), nn.Linear, partial(torch.optim.SGD, lr=0.1))
    assert fit(method, folder(root, **options), tmp_path).backbone.num_features == 3 * 4 * 4
    assert ModuleBackbone(nn.Flatten(), image_size=4).transform(augment=True)(Image.new("RGB", (9, 5))).shape == (
        3,
        4,
        4,
    )


def test_images_of_one_size_need_no_transform(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", [(8, 5)] * 3)
    assert fit(FineTuning(nn.Flatten(), nn.Linear), folder(root), tmp_path).backbone.num_features == 3 * 8 * 5
    turned = write_images(tmp_path / "turned", [(8, 5)] * 2, orientation=6)
    assert fit(FineTuning(nn.Flatten(), nn.Linear), folder(turned), tmp_path).backbone.num_features == 3 * 8 * 5


def test_a_transform_that_leaves_sizes_different(tmp_path: Path) -> None:
    class Half(ModuleBackbone):
        def transform(self, augment: bool) -> Callable[[Any], Tensor]:
            return lambda image: torch.zeros(3, image.height // 2, image.width // 2)

    root = write_images(tmp_path / "images", [(8, 8), (12, 8)])
    method = FineTuning(Half(nn.AdaptiveAvgPool2d(1)), nn.Linear)
    refused(lambda: fit(method, folder(root), tmp_path), "make no batch", "(3, 4, 4)", "(3, 4, 6)")
    kept = FeatureCache(str(tmp_path / "kept"))
    refused(lambda: fit(method, folder(root, feature_cache=kept), tmp_path), "make no batch")


def test_augmentation_without_a_transform(tmp_path: Path) -> None:
    method = FineTuning(nn.Flatten(), nn.Linear)
    refused(lambda: fit(method, images(augment=True), tmp_path), "data.augment=true", "has none")
    refused_stream(images(augment=True, feature_cache=FeatureCache("x")), "needs a trainer")


# --- configurations

CONFIG = """
seed_everything: 1
pictures: false
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone: {backbone}
    head: {{class_path: torch.nn.Linear}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data:
  class_path: mh_lightning.data.Digits
  init_args: {{increment: 5, batch_size: 16, max_train_samples: 40, max_test_samples: 20}}
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""
MOODY = "{class_path: tests.test_plain_modules.Moody, init_args: {width: 4}}"
WRAPPED = "{class_path: mh_lightning.backbones.ModuleBackbone, init_args: {module: %s, frozen: true}}"


def write_config(folder: Path, backbone: str) -> Path:
    path = folder / "plain.yaml"
    path.write_text(CONFIG.format(backbone=backbone))
    return path


def test_from_a_configuration(run: Run, tmp_path: Path) -> None:
    """It runs, goes on from a checkpoint, and its config.yaml runs again."""
    config = write_config(tmp_path, MOODY)
    first = run("fit", config)
    resumed = run("fit", first / "config.yaml", "--ckpt_path", str(first / "checkpoints" / "task_1.ckpt"))
    assert results_of(first) == results_of(resumed)
    for name, value in weights_of(first).items():
        assert torch.equal(value, weights_of(resumed)[name])


def test_kept_features_from_a_configuration(run: Run, refuses: Callable[..., str], tmp_path: Path) -> None:
    kept = ("--data.init_args.feature_cache.folder", str(tmp_path / "kept"))
    config = write_config(tmp_path, WRAPPED % MOODY.replace("Moody", "Small"))
    assert results_of(run("fit", config)) == results_of(run("fit", config, *kept))
    (entry,) = (tmp_path / "kept").iterdir()
    assert entry.name.startswith("tests_test_plain_modules_Small")
    sentence = refuses("fit", write_config(tmp_path, MOODY), *kept)
    assert "frozen=true" in sentence and "ModuleBackbone" in sentence


def test_a_checkpoint_of_another_module(run: Run, refuses: Callable[..., str], tmp_path: Path) -> None:
    first = run("fit", write_config(tmp_path, "{class_path: torch.nn.Flatten}"))
    other = write_config(tmp_path, "{class_path: torch.nn.Identity}")
    sentence = refuses("test", other, "--ckpt_path", str(first / "checkpoints" / "last.ckpt"))
    assert "torch.nn.modules.flatten.Flatten" in sentence and "torch.nn.modules.linear.Identity" in sentence


def test_a_function_that_makes_a_module(run: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path, "{class_path: torchvision.models.resnet18, init_args: {num_classes: 6}}")
    folder = run("fit", config, "--trainer.enable_checkpointing", "false")
    assert results_of(folder)["accuracy_matrix"]
    assert "torchvision.models.resnet18" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("learning_rate_factor", ["learning_rate_factor", "not accepted"]),
        ("frozen", ["frozen", "not accepted"]),
    ],
)
def test_options_that_a_plain_module_has_not(
    option: str, parts: list[str], refuses: Callable[..., str], tmp_path: Path
) -> None:
    backbone = f"{{class_path: torch.nn.Flatten, init_args: {{{option}: 1}}}}"
    sentence = refuses("fit", write_config(tmp_path, backbone))
    assert all(part in sentence for part in parts)
