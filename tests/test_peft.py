"""Parameter-efficient fine-tuning, and a backbone that learns the first task."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor, nn

import mh_lightning
from mh_lightning.backbones import Adapters, Identity, LoRA, Peft, ScaleAndShift, TimmBackbone, VisualPrompts
from mh_lightning.backbones.peft.base import merge
from mh_lightning.data import IBlurry, Tensors
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm, FineTuning, FirstTaskAdaptation

KINDS: dict[str, Peft] = {
    "LoRA": LoRA(rank=2),
    "LoRA everywhere": LoRA(rank=3, alpha=2.0, everywhere=True),
    "scale and shift": ScaleAndShift(),
    "adapters": Adapters(bottleneck=3),
    "deep prompts": VisualPrompts(tokens=2),
    "prompts": VisualPrompts(tokens=2, deep=False),
}
MODELS = ("test_vit", "test_efficientnet", "test_resnet")
PAIRS = [(kind, name) for kind in KINDS for name in MODELS if "prompts" not in kind or name == "test_vit"]


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_what_is_added_learns_and_nothing_else(kind: str, name: str) -> None:
    torch.manual_seed(0)
    plain = TimmBackbone(name, image_size=32).eval()
    torch.manual_seed(0)
    adapted = TimmBackbone(name, image_size=32, peft=KINDS[kind])
    x = images()
    before = adapted(x)
    if "prompts" not in kind:
        torch.testing.assert_close(before, plain(x))  # it changes nothing at first
    assert before.shape == (4, adapted.num_features)
    before.square().sum().backward()
    trained = {one for one, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all((adapted.get_parameter(one).grad is not None) for one in trained)
    assert sum(adapted.get_parameter(one).numel() for one in trained) < 0.6 * sum(p.numel() for p in plain.parameters())
    frozen = {one: value.clone() for one, value in adapted.state_dict().items() if one not in trained}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x)[:, :3].square().mean().backward()
        optimizer.step()
    assert all(torch.equal(value, adapted.state_dict()[one]) for one, value in frozen.items())
    after = adapted(x)
    assert not torch.equal(after, before)
    adapted.finish_training()
    torch.testing.assert_close(adapted(x), after, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert (adapted.peft is None) == (kind.startswith("LoRA") or kind == "scale and shift")
    if adapted.peft is None:
        assert adapted.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(adapted)
    torch.testing.assert_close(copied(x), adapted(x))


def test_low_rank_by_hand() -> None:
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    LoRA(rank=2, alpha=6.0).add_to(model)
    (added,) = layer.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        added.up.normal_()
    expected = weight + 3 * added.up @ added.down
    torch.testing.assert_close(layer.weight, expected)
    merge(model)
    torch.testing.assert_close(layer.weight, expected)
    convolution = nn.Conv2d(3, 6, 3)
    model = nn.Sequential(convolution, nn.Conv2d(6, 6, 3, groups=6))
    LoRA(rank=2).add_to(model)
    trained = [tuple(one.shape) for one in model.parameters() if one.requires_grad]
    assert sorted(trained) == [(2, 27), (6, 2)]


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(5), nn.Conv2d(4, 4, 1, groups=4)]
)
def test_scale_and_shift_by_hand(layer: nn.Module) -> None:
    layer.eval()
    x = (
        torch.randn(2, 5)
        if isinstance(layer, nn.Linear)
        else torch.randn(2, 4 if layer.weight.shape == (4, 1, 1, 1) else 5, 6, 6)
    )
    plain = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    ScaleAndShift().add_to(model)
    scale, shift = (one for one in model.parameters() if one.requires_grad)
    with torch.no_grad():
        scale.normal_()
        shift.normal_()
    bias = plain.bias.clone()
    plain.bias.data.zero_()
    shape = (-1, *[1] * (x.dim() - 2))
    expected = scale.view(shape) * plain(x) + (bias + shift).view(shape)
    torch.testing.assert_close(model(x), expected)


def test_adapters_by_hand() -> None:
    model = timm.create_model("test_vit", num_classes=0)
    mlp = model.blocks[0].mlp
    Adapters(bottleneck=2, scale=0.5).add_to(model)
    block = model.blocks[0].mlp
    with torch.no_grad():
        block.up.weight.normal_()
    x = torch.randn(2, 7, 64)
    expected = mlp(x) + 0.5 * (torch.relu(x @ block.down.weight.T + block.down.bias) @ block.up.weight.T)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_by_hand(deep: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    blocks = list(model.blocks)
    x = images(2, 160)
    VisualPrompts(tokens=3, deep=deep).add_to(model)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    count = tokens.shape[1]
    for place, block in enumerate(blocks):
        prompts = model.blocks[place].prompts
        if prompts is not None:
            tokens = torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], dim=1)
        tokens = block(tokens)
        if deep:
            tokens = torch.cat([tokens[:, :1], tokens[:, 4:]], dim=1)
    if not deep:
        tokens = torch.cat([tokens[:, :1], tokens[:, 4:]], dim=1)
    assert tokens.shape[1] == count
    torch.testing.assert_close(model.forward_features(x), model.norm(tokens))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnet", {"peft": VisualPrompts()}, "VisualPrompts are tokens, and ResNet has none"),
        (
            "test_vit",
            {"peft": LoRA(rank=65)},
            "LoRA.rank=65 is above the width 64 of blocks.0.attn.qkv; take 64 or less",
        ),
        ("test_vit", {"peft": LoRA(), "frozen": False}, "backbone.frozen=false: backbone.peft trains nothing but"),
        ("test_vit", {"peft": LoRA(), "layer_decay": 0.5}, "backbone.layer_decay: backbone.peft trains nothing but"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimmBackbone(name, image_size=32, **options)


@pytest.mark.parametrize(
    "make",
    [
        partial(LoRA, rank=0),
        partial(LoRA, alpha=0.0),
        partial(Adapters, bottleneck=0),
        partial(Adapters, scale=-1.0),
        partial(VisualPrompts, tokens=0),
    ],
)
def test_options_out_of_range(make: Any) -> None:
    with pytest.raises(UserError, match=r"backbone.peft: \w+.\w+ must"):
        make()


# --- the first task


def colours(seed: int = 0, **options: Any) -> Tensors:
    """Four classes of images that differ in the colour of noise."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), 12)
    means = np.array([[150, 110, 110], [110, 150, 110], [110, 110, 150], [140, 140, 100]])
    pixels = means[labels][:, None, None] + generator.normal(0, 40, (48, 32, 32, 3))
    x = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    y = torch.from_numpy(labels)
    return Tensors(x, y, x, y, **{"increment": 2, "batch_size": 8} | options)


def adapting(kind: str | None = "LoRA", name: str = "test_vit", **options: Any) -> ClosedForm:
    seed_everything(0)
    body = TimmBackbone(name, image_size=32, frozen=kind is not None, peft=None if kind is None else KINDS[kind])
    return ClosedForm(body, ClassMeans, FirstTaskAdaptation(**{"epochs": 2, "batch_size": 6} | options))


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "pictures": False,
         "accelerator": "cpu"}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [*PAIRS, (None, "test_resnet")])
def test_adapted_then_closed_form(kind: str | None, name: str, tmp_path: Path) -> None:
    method = adapting(kind, name)
    before = {one: value.clone() for one, value in method.backbone.state_dict().items()}
    results = mh_lightning.fit(method, colours(), run_dir=tmp_path, **QUIET)
    assert bool(method.adapted) and not any(one.requires_grad for one in method.backbone.parameters())
    changed = [one for one, value in method.backbone.state_dict().items()
               if one not in before or not torch.equal(value, before[one])]  # fmt: skip
    assert changed
    pixels = colours().load().train.inputs.numpy()
    model, targets = mh_lightning.load(results.folder), torch.arange(4).repeat_interleave(12)
    means = ClassMeans(method.backbone.num_features, 4)
    means.update(torch.from_numpy(model.features(pixels)), targets)
    torch.testing.assert_close(means.sums, method.closed_form_head.sums, rtol=1e-4, atol=1e-3)
    right = model.predict(pixels).probabilities.argmax(axis=1) == targets.numpy()
    assert right.mean() == pytest.approx(results["last_accuracy"])
    assert results["cost"]["state_bytes"] > method.backbone.learnt_bytes > 0


def test_one_step_of_the_adaptation_by_hand(tmp_path: Path) -> None:
    method = adapting("scale and shift", "test_resnet", epochs=1, batch_size=24, weight_decay=0.0)
    twin = copy.deepcopy(method.backbone).train()
    data = colours()
    mh_lightning.fit(method, data, run_dir=tmp_path, **QUIET)
    trained = [one for one in twin.parameters() if one.requires_grad]
    torch.manual_seed(mh_lightning.random_numbers.seed_from(0))
    classifier = nn.Linear(twin.num_features, 2)
    loader = data.unaugmented_train_dataloader(0)
    x, y = (torch.cat(parts) for parts in list(zip(*loader, strict=True))[:2])
    loss = nn.functional.cross_entropy(classifier(twin(x)), y)
    for one, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
        one.data -= 0.01 * gradient
    twin.finish_training()
    for name, value in method.backbone.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    for kind in ("LoRA", "adapters"):
        results = mh_lightning.fit(adapting(kind), colours(), run_dir=tmp_path, experiment=kind, **QUIET)
        resumed = adapting(kind)
        checkpoint = results.folder / "checkpoints" / "task_1.ckpt"
        mh_lightning.fit(resumed, colours(), run_dir=tmp_path, experiment=kind, ckpt_path=checkpoint, **QUIET)
        first, second = (
            json.loads((tmp_path / kind / f"version_{place}" / "results.json").read_text()) for place in (0, 1)
        )
        assert first["accuracy_matrix"] == second["accuracy_matrix"]
        whole = torch.load(results.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, whole[name]), name


def test_adaptation_refuses(tmp_path: Path) -> None:
    x, y = torch.eye(4), torch.arange(4)
    frozen = ClosedForm(Identity(4), ClassMeans, FirstTaskAdaptation())
    for method, data, message in (
        (frozen, Tensors(x, y, x, y, increment=2), "the backbone is frozen and has nothing to train"),
        (adapting(), colours(increment=1), "the first task has one class"),
        (adapting("LoRA", learning_rate=1e30), colours(), r"adaptation to the first task diverged|NaN or infinite"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            mh_lightning.fit(method, data, run_dir=tmp_path, **QUIET)
    for option in ({"epochs": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}):
        with pytest.raises(UserError, match="first_task_adaptation"):
            FirstTaskAdaptation(**option)


def test_a_gradient_method_trains_what_is_added(tmp_path: Path) -> None:
    body = TimmBackbone("test_vit", image_size=32, peft=KINDS["LoRA"])
    own = {name: value.clone() for name, value in body.state_dict().items()}
    method = FineTuning(body, nn.Linear, partial(torch.optim.SGD, lr=0.1))
    results = mh_lightning.fit(method, colours(), run_dir=tmp_path, **QUIET)
    changed = {name for name, value in body.state_dict().items() if not torch.equal(value, own[name])}
    assert changed and all(".up" in name or ".down" in name for name in changed)
    pixels = colours().load().train.inputs.numpy()
    loaded = mh_lightning.load(results.folder).predict(pixels)
    np.testing.assert_allclose(loaded.probabilities.sum(axis=1), 1, atol=1e-5)
    with torch.no_grad(), method.evaluating():
        images_of = [body.transform(False)(Image.fromarray(one)) for one in pixels]
        direct = method(torch.stack(images_of)).softmax(dim=1)
    np.testing.assert_allclose(loaded.probabilities, direct.numpy(), atol=1e-5)


def test_the_first_task_of_a_stream_without_borders(tmp_path: Path) -> None:
    data = colours(blurry_borders=IBlurry(disjoint=0.0, minor=0.5))
    mh_lightning.fit(adapting(), data, run_dir=tmp_path, **QUIET)
    assert data.classes_in_training(0) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["hiera_tiny_224", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_models_that_adapters_do_not_suit(name: str) -> None:
    with pytest.raises(UserError, match=r"backbone.peft=Adapters does not suit|Adapters needs a transformer"):
        TimmBackbone(name, peft=Adapters(bottleneck=2))


def test_numbers_that_must_be_whole() -> None:
    with pytest.raises(UserError, match=r"epochs must be a whole number, got 1\.5"):
        FirstTaskAdaptation(epochs=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"batch_size must be a whole number, got 2\.5"):
        colours(batch_size=2.5)
    with pytest.raises(UserError, match=r"data\.blurry_borders must be an object such as"):
        colours(blurry_borders="IBlurry")
