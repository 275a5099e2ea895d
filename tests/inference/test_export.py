"""Files for other programs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor, nn

import mh_lightning
from mh_lightning.backbones import Identity, TimmBackbone
from mh_lightning.commands import main
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    JointKernelRidge,
    JointLogisticRegression,
    KernelMemoryUnits,
    RandomFeatureDiscriminant,
    RandomFeatureRidge,
    RandomProjectionRidge,
    RegularisedDiscriminant,
    RidgeRegression,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
    TruncatedProjection,
)
from mh_lightning.inference import export
from mh_lightning.layers import MLP, StackedMemoryHeads
from mh_lightning.methods import SLCA, ClosedForm, Ensemble, FineTuning
from mh_lightning.methods.alignment import ClassifierAlignment
from mh_lightning.methods.base import ContinualMethod
from tests.blobs import FEATURES, blobs
from tests.fits import fit, stream

FEW = {"num_projections": 30}
HEADS: dict[str, Any] = {
    "kernel": KernelMemoryUnits,
    "kernel of points": partial(KernelMemoryUnits, normalization="none"),
    "means": ClassMeans,
    "ridge": RidgeRegression,
    "random": partial(RandomFeatureRidge, **FEW),
    "fourier": partial(RandomFeatureRidge, kind="fourier", **FEW),
    "klda": partial(RandomFeatureDiscriminant, **FEW),
    "ranpac": partial(RandomProjectionRidge, **FEW),
    "gaussians": partial(RegularisedDiscriminant, rank=2),
    "fecam": ShrunkClassCovariances,
    "slda": StreamingLinearDiscriminant,
    "loranpac": partial(TruncatedProjection, rank=5, **FEW),
    "joint": JointLogisticRegression,
    "joint kernel": JointKernelRidge,
}
MEMORY_HEAD = partial(mh_lightning.MHLinear, key_mem_units=5, delta=2, upd_k="ad_hoc_WTA")
LEARNT_BY_GRADIENT: dict[str, Any] = {
    "memory head": lambda backbone: FineTuning(backbone, MEMORY_HEAD),
    "stack": lambda backbone: FineTuning(backbone, partial(StackedMemoryHeads, hidden_features=(6,), key_mem_units=4)),
    "mlp": lambda backbone: FineTuning(backbone, partial(MLP, hidden_features=(6,))),
    "ensemble": lambda backbone: Ensemble(backbone, nn.Linear, members=2),
    "slca": lambda backbone: SLCA(backbone, alignment=ClassifierAlignment(epochs=1, samples_per_class=8)),
}
METHODS = {name: partial(ClosedForm, head=head) for name, head in HEADS.items()} | LEARNT_BY_GRADIENT
WITH_MEMORY_HEADS = ("memory head", "stack")


def trained(name: str, folder: Path) -> mh_lightning.Model:
    seed_everything(0)
    method: ContinualMethod = METHODS[name](Identity(FEATURES))
    fit(method, folder, callbacks=[], enable_checkpointing=False)
    return mh_lightning.Model(method)


def answers_of(path: Path, x: Tensor) -> Any:
    """By onnxruntime or torch alone."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(["probabilities"], {"images": x.numpy()})[0]
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x).numpy()
    return torch.jit.load(str(path))(x).numpy()  # type: ignore[no-untyped-call]


def check(model: mh_lightning.Model, format: Any, path: Path) -> None:
    assert export(model, path, format) < 1e-4
    queries, _ = blobs(50, 2)
    for x in (queries, queries[:1], queries[:0] if path.suffix == ".onnx" else queries[:2]):
        np.testing.assert_allclose(answers_of(path, x), model.predict(x).probabilities, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", METHODS)
def test_files_of_torch_answer_alike(name: str, tmp_path: Path) -> None:
    model = trained(name, tmp_path)
    check(model, "exported_program", tmp_path / "model.pt2")
    if name in WITH_MEMORY_HEADS:
        with pytest.raises(UserError, match=r"format=torchscript: FineTuning/.* cannot be exported so .*; try another"):
            export(model, tmp_path / "model.pt", "torchscript")
        assert not (tmp_path / "model.pt").exists()
    else:
        check(model, "torchscript", tmp_path / "model.pt")
    head = model.method.head
    if isinstance(head, ClosedFormHead):  # without what it learns with
        sums = sum(buffer.nbytes for buffer in head.buffers())
        assert (tmp_path / "model.pt2").stat().st_size < 120_000 or sums < 120_000


@pytest.mark.parametrize("name", METHODS)
def test_onnx_answers_alike(name: str, tmp_path: Path) -> None:
    check(trained(name, tmp_path), "onnx", tmp_path / "model.onnx")


def test_images_go_in_and_the_file_tells_what_it_takes(tmp_path: Path) -> None:
    seed_everything(0)
    x = torch.randint(0, 256, (24, 40, 36, 3), dtype=torch.uint8)
    y = torch.arange(24) % 3
    data = Tensors(x, y, x, y, class_names=["ant", "bee", "cat"])
    fit(ClosedForm(TimmBackbone("test_resnet", image_size=32), KernelMemoryUnits), tmp_path / "run", data)
    main_exits("export", "--from", str(tmp_path / "run"), "--output", str(tmp_path / "model.onnx"), "--opset", "18")
    main_exits("export", "--from", str(tmp_path / "run"), "--output", str(tmp_path / "model.pt2"),
               "--format", "exported_program")  # fmt: skip
    about = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).get_modelmeta().custom_metadata_map
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == about
    assert json.loads(about["class_names"]) == ["ant", "bee", "cat"] and json.loads(about["input_shape"]) == [3, 32, 32]
    assert "Resize(size=" in about["transform"] and "Normalize(" in about["transform"]
    model = mh_lightning.load(tmp_path / "run")
    transform = model.method.backbone.transform(augment=False)
    assert transform is not None
    ready = torch.stack([transform(Image.fromarray(one.numpy())) for one in x])
    for file in ("model.onnx", "model.pt2"):
        np.testing.assert_allclose(answers_of(tmp_path / file, ready), model.predict(x).probabilities, atol=1e-5)


def main_exits(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert (ended.value.code or 0) == code


class OwnForward(FineTuning):
    """A method that answers in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        """Turned round."""
        return -super().forward(x)


class DependsOnTheBatch(nn.Module):
    """A backbone that no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice, if there are many."""
        return x * 2 if x.shape[0] > 50 else x


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    own = OwnForward(Identity(FEATURES), nn.Linear)
    fit(own, tmp_path / "own", callbacks=[], enable_checkpointing=False)
    with pytest.raises(UserError, match=r"OwnForward has a forward of its own; define OwnForward.answering_head"):
        export(mh_lightning.Model(own), tmp_path / "x.onnx")
    method = FineTuning(DependsOnTheBatch(), nn.Linear)
    fit(method, tmp_path / "other", callbacks=[], enable_checkpointing=False)
    model = mh_lightning.Model(method)
    with pytest.raises(UserError, match="input_shape: the backbone does not tell"):
        export(model, tmp_path / "x.pt2", "exported_program")
    with pytest.raises(UserError, match=r"format=exported_program: FineTuning/ModuleBackbone/.* cannot be exported so"):
        export(model, tmp_path / "x.pt2", "exported_program", input_shape=(FEATURES,))
    with pytest.raises(UserError, match="the file's probabilities differ from the model's by up to"):
        export(model, tmp_path / "x.pt", "torchscript", input_shape=(FEATURES,))
    with pytest.raises(UserError, match=r"'x\.onnx' is named as one of format=onnx, got format=torchscript"):
        export(model, "x.onnx", "torchscript")
    with pytest.raises(UserError, match="format must be one of onnx, torchscript, exported_program; got 'pdf'"):
        export(model, tmp_path / "x.pdf", "pdf")  # type: ignore[arg-type]
    empty = ClosedForm(Identity(FEATURES), ClassMeans)
    empty.learnt_stream = stream_of_blobs()
    empty.make_parts()
    with pytest.raises(UserError, match="ClassMeans has learnt no sample yet"):
        export(mh_lightning.Model(empty), tmp_path / "x.onnx")
    assert not [*tmp_path.glob("*x.*")]


def stream_of_blobs() -> Any:
    data = stream()
    data.setup("fit")
    return data.learnt()
