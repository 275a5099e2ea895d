"""A trained model from its files alone."""

from collections.abc import Callable
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
from mh_lightning import methods
from mh_lightning.backbones import Adapters, Identity, TimmBackbone
from mh_lightning.data import Tensors
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans, KernelMemoryUnits, RandomFeatureRidge
from mh_lightning.layers import MLP
from mh_lightning.methods import (
    SLCA,
    ClosedForm,
    Ensemble,
    ExperienceReplay,
    FineTuning,
    GDumb,
)
from mh_lightning.methods.alignment import ClassifierAlignment
from mh_lightning.methods.base import ContinualMethod
from mh_lightning.methods.description import arguments_of
from mh_lightning.methods.prompting import PromptMethod
from tests.blobs import CLASSES, FEATURES, blobs
from tests.fits import fit, stream

MEMORY_HEAD = partial(mh_lightning.MHLinear, key_mem_units=5, delta=2, upd_k="ad_hoc_WTA")
METHODS: dict[str, Callable[[nn.Module], ContinualMethod]] = {
    "kernel": lambda backbone: ClosedForm(backbone, partial(KernelMemoryUnits, max_bytes=20_000)),
    "means": lambda backbone: ClosedForm(backbone, ClassMeans),
    "drawn": lambda backbone: ClosedForm(backbone, partial(RandomFeatureRidge, num_projections=30)),
    "memory head": lambda backbone: FineTuning(backbone, MEMORY_HEAD),
    "linear": lambda backbone: FineTuning(backbone, nn.Linear),
    "mlp": lambda backbone: FineTuning(backbone, partial(MLP, hidden_features=(6,))),
    "ensemble": lambda backbone: Ensemble(backbone, nn.Linear, members=3),
    "replay": lambda backbone: ExperienceReplay(backbone, nn.Linear, buffer_size=20),
    "gdumb": lambda backbone: GDumb(backbone, nn.Linear, buffer_size=20, epochs=2),
    "slca": lambda backbone: SLCA(backbone, alignment=ClassifierAlignment(epochs=1, samples_per_class=8)),
    "slca, not aligned": lambda backbone: SLCA(backbone, nn.Linear),
}


@pytest.mark.parametrize("name", METHODS)
def test_answers_as_it_did_under_the_trainer(name: str, tmp_path: Path) -> None:
    seed_everything(0)
    method = METHODS[name](Identity(FEATURES))
    trainer = fit(method, tmp_path)
    (wanted,) = [torch.cat(list(trainer.predict(method, stream())))]  # type: ignore[arg-type]
    queries, _ = blobs(50, 2)
    model = mh_lightning.load(tmp_path)
    labels, probabilities = model.predict(queries, batch_size=7)
    np.testing.assert_allclose(probabilities, wanted.numpy(), atol=1e-6)
    assert labels == [model.class_names[best] for best in probabilities.argmax(axis=1)]
    assert model.class_names == [str(label) for label in range(CLASSES)]
    model.save(tmp_path / "model.mh")
    again = mh_lightning.load(tmp_path / "model.mh")
    np.testing.assert_array_equal(again.predict(queries.numpy()).probabilities, model.predict(queries).probabilities)
    np.testing.assert_array_equal(mh_lightning.Model(method).predict(queries)[1], model.predict(queries)[1])
    loaded = type(method).load_from_checkpoint(tmp_path / "checkpoints" / "task_1.ckpt")
    assert type(loaded) is type(method) and not loaded.training


def images(samples: int) -> Tensor:
    return torch.randint(0, 256, (samples, 40, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def of_images(tmp_path: Path, **options: Any) -> tuple[ContinualMethod, Tensors]:
    seed_everything(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("test_resnet", checkpoint_path=str(tmp_path / "weights.pth"), image_size=32, **options)
    x, y = images(24), torch.arange(24) % 4
    return ClosedForm(backbone, ClassMeans), Tensors(x, y, x, y, increment=2, class_names=["ant", "bee", "cat", "dog"])


def test_a_frozen_backbone_is_named_and_not_kept(tmp_path: Path) -> None:
    method, data = of_images(tmp_path)
    fit(method, tmp_path / "without", data)
    fit(*[of_images(tmp_path, in_checkpoints=True)[0], tmp_path / "within", data])
    sizes = {name: (tmp_path / name / "checkpoints" / "last.ckpt").stat().st_size for name in ("without", "within")}
    weights = sum(value.nbytes for value in method.backbone.state_dict().values())
    assert sizes["within"] - sizes["without"] > 0.9 * weights
    wanted = mh_lightning.Model(method).predict(images(24)).probabilities
    for name in sizes:
        np.testing.assert_array_equal(mh_lightning.load(tmp_path / name).predict(images(24)).probabilities, wanted)
    mh_lightning.load(tmp_path / "without").save(tmp_path / "model.mh")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")  # drawn anew
    with pytest.raises(UserError, match="its weights are not those that the checkpoint was trained with"):
        mh_lightning.load(tmp_path / "without")
    (tmp_path / "weights.pth").unlink()
    with pytest.raises(UserError, match=r"weights.pth' is no file"):
        mh_lightning.load(tmp_path / "without")
    for name in ("within", "model.mh"):
        np.testing.assert_array_equal(mh_lightning.load(tmp_path / name).predict(images(24)).probabilities, wanted)


def test_a_run_is_resumed_from_a_checkpoint_without_the_backbone(tmp_path: Path) -> None:
    method, data = of_images(tmp_path)
    fit(method, tmp_path / "whole", data)
    resumed, _ = of_images(tmp_path)
    # the fixture has drawn other weights into the file, so they are put back
    resumed.backbone.load_state_dict(method.backbone.state_dict())
    fit(resumed, tmp_path / "resumed", data, tmp_path / "whole" / "checkpoints" / "task_1.ckpt")
    assert torch.equal(resumed.head.sums, method.head.sums)  # type: ignore[union-attr]
    other, _ = of_images(tmp_path)
    other.backbone.load_state_dict(TimmBackbone("test_resnet", image_size=32).state_dict())  # drawn anew
    with pytest.raises(UserError, match="its weights are not those"):
        fit(other, tmp_path / "other", data, tmp_path / "whole" / "checkpoints" / "task_1.ckpt")


NO_METHODS = ("Batch", "Head", "ContinualMethod", "ClassifierAlignment", "FirstTaskAdaptation")


@pytest.mark.parametrize("name", [name for name in methods.__all__ if name not in NO_METHODS])
def test_every_argument_of_a_method_is_told(name: str) -> None:
    kind = getattr(methods, name)
    options = {"buffer_size": 9} if "buffer_size" in arguments_of(kind) else {}
    if "replacement" in arguments_of(kind):
        options["replacement"] = "random"
    backbone = Identity(2)
    if issubclass(kind, PromptMethod | methods.EASE):
        adapters = Adapters() if kind is methods.EASE else None
        backbone = TimmBackbone("test_vit", image_size=32, peft=adapters)
    method = kind(backbone, ClassMeans if name == "ClosedForm" else nn.Linear, **options)
    method.learnt_stream = LearntStream(["cat", "dog"], [[0, 1]])
    method.make_parts()
    told = method.description()["model"]["init_args"]
    assert told.items() >= options.items()
    assert arguments_of(kind) - told.keys() <= {
        "alignment",
        "lr_scheduler",
    }  # not told where there is none


def test_an_argument_that_is_no_attribute_is_lost_and_told() -> None:
    class Careless(methods.FineTuning):
        def __init__(self, backbone: nn.Module, head: Any, strength: float = 1.0, **options: Any) -> None:
            super().__init__(backbone, head, **options)
            self.lam = strength

    method = Careless(Identity(2), nn.Linear, strength=3.0)
    method.learnt_stream = LearntStream(["cat", "dog"], [[0, 1]])
    with pytest.warns(UserWarning, match=r"Careless.strength: .* set self.strength in __init__"):
        method.description()


def test_all_forms_of_an_image_are_one(tmp_path: Path) -> None:
    method, data = of_images(tmp_path)
    fit(method, tmp_path / "run", data)
    model = mh_lightning.load(tmp_path / "run")
    pixels = images(3)
    pictures = [Image.fromarray(one.numpy()) for one in pixels]
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    transform = method.backbone.transform(augment=False)
    assert transform is not None
    ready = torch.stack([transform(picture) for picture in pictures])
    features = model.features(pixels)
    wanted = model.predict(pixels).probabilities
    assert wanted.shape == (3, 4) and features.shape == (3, method.backbone.num_features)
    forms = [pixels.numpy(), list(pixels.numpy()), pictures, paths, [str(path) for path in paths], ready, list(ready),
             features, torch.from_numpy(features), pixels.permute(0, 3, 1, 2)]  # fmt: skip
    for form in forms:
        np.testing.assert_allclose(model.predict(form).probabilities, wanted, atol=1e-6)
    for one in (paths[0], str(paths[0]), pictures[0], pixels[0], pixels[0].numpy()):
        np.testing.assert_allclose(model.predict(one).probabilities, wanted[:1], atol=1e-6)
    grey = pixels[..., 0]
    assert model.predict(grey).probabilities.shape == (3, 4) and len(model.predict([]).labels) == 0


def test_questions_that_cannot_be_answered(tmp_path: Path) -> None:
    method, data = of_images(tmp_path)
    fit(method, tmp_path / "run", data)
    model = mh_lightning.load(tmp_path / "run")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    questions: list[tuple[Any, str]] = [
        ([tmp_path / "bad.png"], "bad.png' cannot be read"),
        (torch.zeros(2, 7), r"Features must be \(b, 96\), got \(2, 7\)"),
        (torch.zeros(2, 7, dtype=torch.int64), "uint8"),
        (3, "paths, images, arrays or tensors are needed, got int"),
        ([None], "an image is a path, a PIL image or an array of uint8, got a NoneType"),
        (np.zeros((2, 5, 5, 7), dtype=np.uint8), "is no image"),
    ]
    for question, message in questions:
        with pytest.raises(UserError, match=message):
            model.predict(question)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        model.predict([], batch_size=0)


def test_objects_of_python_are_given_again(tmp_path: Path) -> None:
    seed_everything(0)
    method = FineTuning(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh()), lambda n, o: nn.Linear(n, o))
    fit(method, tmp_path)
    queries, _ = blobs(50, 2)
    with pytest.raises(UserError, match="does not describe its backbone, which was made in Python; give backbone="):
        mh_lightning.load(tmp_path)
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh())
    with pytest.raises(UserError, match="does not describe its head"):
        mh_lightning.load(tmp_path, backbone=net)
    model = mh_lightning.load(tmp_path, backbone=net, head=nn.Linear)
    with torch.no_grad():
        np.testing.assert_array_equal(model.predict(queries).probabilities, mh_lightning.Model(method)(queries))
    with pytest.raises(UserError, match=r"holds FineTuning/.*, but the configuration describes FineTuning/.*MHLinear"):
        mh_lightning.load(tmp_path, backbone=net, head=MEMORY_HEAD)


class Own(FineTuning):
    """A user's method."""


def test_only_classes_that_are_trusted_are_made(tmp_path: Path) -> None:
    fit(Own(Identity(FEATURES), nn.Linear), tmp_path)
    with pytest.raises(UserError, match=r"names the class 'tests\..*Own', and only those of mh_lightning and torch.nn"):
        mh_lightning.load(tmp_path)
    assert isinstance(mh_lightning.load(tmp_path, trust="tests").method, Own)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    marker = tmp_path / "marker"
    evil: list[Any] = [
        {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}},
        {"class_path": "mh_lightning.files.os.system", "init_args": {"command": f"touch {marker}"}},
        {"class_path": "mh_lightning.methods.FineTuning",
         "init_args": {"backbone": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}}},
        {"class_path": "mh_lightning.methods.FineTuning", "init_args": {"backbone": None, "head": "os.system"}},
        "os.system",
        {"class_path": "mh_lightning.methods.FineTuning", "init_args": 3},
        {"class_path": "mh_lightning.backbones.Identity", "init_args": {"num_features": 5}},
        {"class_path": "mh_lightning.methods.FineTuning", "init_args": {"no": 5}},
    ]  # fmt: skip
    for tree in evil:
        torch.save({**content, "model": tree}, path)
        with pytest.raises(UserError):
            mh_lightning.load(path)
        assert not marker.exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("stream", {}), ("stream", {"class_names": ["a", "a"]}), ("stream", None), ("num_features", "x"),
     ("num_classes", 3), ("state_dict", {}), ("architecture", "other")],
)  # fmt: skip
def test_damage_is_told(entry: str, value: Any, tmp_path: Path) -> None:
    fit(FineTuning(Identity(FEATURES), nn.Linear), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    changed = {**content[entry], **value} if isinstance(value, dict) and value else value
    torch.save({**content, entry: changed}, path)
    with pytest.raises(UserError, match=r"^from"):
        mh_lightning.load(path)


@pytest.mark.parametrize(("entry", "value"), [("seen", -3), ("bits", 5), ("labels", 99), ("labels", -1)])
def test_damaged_samples_of_a_head_are_told(entry: str, value: int, tmp_path: Path) -> None:
    fit(ClosedForm(Identity(FEATURES), partial(KernelMemoryUnits, max_bytes=20_000)), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"][f"head.store.{entry}"].fill_(value)
    torch.save(content, path)
    with pytest.raises(UserError, match="the samples that the head keeps is damaged"):
        mh_lightning.load(path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoints; give a run folder"):
        mh_lightning.load(tmp_path)
    with pytest.raises(UserError, match=r"from=.*: there is no such file or folder"):
        mh_lightning.load(tmp_path / "nothing")
    fit(FineTuning(Identity(FEATURES), nn.Linear), tmp_path / "exp" / "version_3")
    assert mh_lightning.load(tmp_path / "exp").class_names[0] == "0"
    with pytest.raises(UserError, match="holds a FineTuning, which is no ClosedForm"):
        ClosedForm.load_from_checkpoint(tmp_path / "exp")
