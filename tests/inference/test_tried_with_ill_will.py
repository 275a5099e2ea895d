"""What somebody found who tried to break loading, learning on and exporting."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import nn

import mh_lightning
from mh_lightning.backbones import Identity, TimmBackbone
from mh_lightning.cli import main
from mh_lightning.commands import main as front
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.inference import export
from mh_lightning.methods import ClosedForm, ExperienceReplay, FineTuning
from mh_lightning.sklearn import MemoryHeadClassifier, NearestClassMean
from tests.blobs import FEATURES, blobs
from tests.fits import fit
from tests.inference.test_going_on import NAMES, part

X, Y = blobs(60, 5)


def means(tmp_path: Path, labels: list[int] | None = None) -> ClosedForm:
    seed_everything(0)
    method = ClosedForm(Identity(FEATURES), ClassMeans)
    fit(method, tmp_path, part(labels or [0, 1, 2, 3]))
    return method


def counts_of(model: mh_lightning.Model) -> dict[str, int]:
    head: Any = model.method.head
    head.settle()
    return {name: int(count) for name, count in zip(model.class_names, head.counts, strict=True)}


@pytest.mark.parametrize("loaded", [True, False])
def test_each_fit_goes_on_with_the_names_of_all_before(loaded: bool, tmp_path: Path) -> None:
    method: Any = means(tmp_path / "0")
    if loaded:
        method = mh_lightning.load(tmp_path / "0").method
    fit(method, tmp_path / "1", part([4, 5]))
    fit(method, tmp_path / "2", part([6, 4]))
    model = mh_lightning.Model(method)
    assert model.class_names == NAMES
    _, y = blobs(150, 1)
    wanted = torch.bincount(y, minlength=7) + torch.tensor([0, 0, 0, 0, int((y == 4).sum()), 0, 0])
    assert counts_of(model) == dict(zip(NAMES, wanted.tolist(), strict=True))
    model.learn(X[:3], ["pig"] * 3)
    assert model.predict(X[:2]).probabilities.shape == (2, 8)
    model.save(tmp_path / "more.mh")
    assert counts_of(mh_lightning.load(tmp_path / "more.mh")) == counts_of(model) and model.class_names == [
        *NAMES,
        "pig",
    ]


def test_labels_and_notes_are_what_a_file_can_hold(tmp_path: Path) -> None:
    means(tmp_path)
    model = mh_lightning.load(tmp_path)
    model.learn(X[:2], np.array(["pig", "ant"]))
    model.save(tmp_path / "a.mh")
    assert mh_lightning.load(tmp_path / "a.mh").class_names[-1] == "pig"
    for labels in ("cat", [7, 8, 9], torch.tensor([1, 2, 3]), None):
        with pytest.raises(UserError, match="learn: labels must be"):
            model.learn(X[:3], labels)  # type: ignore[arg-type]
    model.notes["where"] = tmp_path
    with pytest.raises(UserError, match="notes must be plain values"):
        model.save(tmp_path / "b.mh")
    assert not (tmp_path / "b.mh").exists()


def test_inputs_of_other_kinds(tmp_path: Path) -> None:
    method = FineTuning(Identity(FEATURES), nn.Linear)
    fit(method, tmp_path, part([0, 1]))
    model = mh_lightning.load(tmp_path)
    wanted = model.predict(X).probabilities
    for other in (X.double(), X.double().numpy(), X.numpy().astype(">f4")):
        np.testing.assert_allclose(model.predict(other).probabilities, wanted, atol=1e-6)
    assert model.features([]).shape == (0, FEATURES)
    with pytest.raises(UserError, match="inputs are a batch"):
        model.predict(X[0])
    with pytest.raises(UserError, match="NaN or infinite"):
        model.predict(X * torch.nan)
    with pytest.raises(UserError, match=r"'a.png' cannot be read"):
        model.predict(np.array(["a.png"]))


def test_continuing_makes_no_class_that_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Net: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = content["model"]["init_args"]
    for change in (
        {"init_args": {**own, "backbone": {"class_path": "evil.Net"}}},
        {"init_args": {**own, "head": {"class_path": "evil.Net"}}},
        {"init_args": {**own, "head": "evil.Net"}},
        {"init_args": {**own, "backbone": "evil.Net"}},
        {"class_path": "evil.Net"},
        {"init_args": None},
    ):
        torch.save({**content, "model": {**content["model"], **change}}, tmp_path / "x.ckpt")
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--continue-from", "x.ckpt", "--data=Digits"])
        assert capsys.readouterr().err.startswith("error: continue_from: ")
        with pytest.raises(UserError):
            mh_lightning.load("x.ckpt")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"notes": None}, {"notes": [1]}, {"state_dict": None}, {"state_dict": [1]}, {"backbone_settings": [1]},
        {"callbacks": [1]}, {"callbacks": {"ContinualMetrics": 3}}, {"num_features": True}, {"num_features": 10**13},
        {"callbacks": {"ContinualMetrics": {"counts": {"test": {"correct": 1, "total": 2}}}}},
        {"stream": {"epochs": -5}},
        {"stream": {"class_names": "abcd"}}, {"stream": {"class_groups": None}}, {"stream": {"image_transforms": "no"}},
        {"model": {"class_path": "mh_lightning.methods.ClosedForm", "init_args": {
            "backbone": {"class_path": "mh_lightning.backbones.Identity", "init_args": {"no": 1}},
            "head": {"class_path": "mh_lightning.heads.ClassMeans"}}}},
    ],
)  # fmt: skip
def test_damage_is_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    means(tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    changed = {name: {**content[name], **value} if name == "stream" else value for name, value in change.items()}
    torch.save({**content, **changed}, path)
    with pytest.raises(UserError, match=r"^from"):
        mh_lightning.load(path)


def test_folders_and_files_with_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(0)
    x = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    y = torch.arange(8) % 2
    fit(ClosedForm(TimmBackbone("test_resnet", image_size=32), ClassMeans), tmp_path / "run", Tensors(x, y, x, y))
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(x[0].numpy()).save(folder / "good.png")
    odd = os.path.join(os.fsencode(folder), b"\xff\xfe.png")
    with open(odd, "wb") as file:
        file.write((folder / "good.png").read_bytes())
    words = ["predict", "--from", str(tmp_path / "run"), "--images", str(folder), "--output"]
    with pytest.raises(SystemExit, match="1"):
        front([*words, str(tmp_path / "p.csv")])
    assert "holds a character that no table can hold" in capsys.readouterr().err
    assert "good.png" in (tmp_path / "p.csv").read_text()
    for more, message in (
        (["o.html"], "would be the page's name"),
        (["p.csv", "--device", "meta"], "'meta' is not there"),
    ):
        with pytest.raises(SystemExit, match="2"):
            front([*words, *more])
        assert message in capsys.readouterr().err


def test_options_of_an_export_that_would_do_nothing(tmp_path: Path) -> None:
    means(tmp_path)
    model = mh_lightning.load(tmp_path)
    for options, message in (
        ({"opset": 3}, "opset=3: torch writes"),
        ({"opset": 18, "format": "torchscript"}, "opset=18 is for format=onnx"),
        ({"input_shape": [5]}, "input_shape: the backbone tells what it takes"),
    ):
        with pytest.raises(UserError, match=message):
            export(model, tmp_path / "x", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "x").exists()


def test_estimators_refuse_and_stay_as_they_were() -> None:
    x, y = X.numpy(), Y.numpy()
    for options in ({"batch_size": 0}, {"epochs": 0}, {"learning_rate": 1e30}, {"delta": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            MemoryHeadClassifier(**options).fit(x, y)
    model = NearestClassMean().fit(x, y)
    before = model.predict_proba(x)
    with pytest.raises(UserError, match="give one kind"):
        model.partial_fit(x, y.astype(str))
    with pytest.raises(UserError, match="too large"):
        model.partial_fit(np.full_like(x, 1e30), y + 10)
    assert model.classes_.tolist() == list(range(7))
    np.testing.assert_array_equal(model.predict_proba(x), before)


def test_evaluation_after_a_fit_reads_no_data_again_and_refuses_nothing(tmp_path: Path) -> None:
    data, read = part([0, 1, 2, 3]), []
    load = data.load
    data.load = lambda: read.append(1) or load()  # type: ignore[method-assign,func-returns-value]
    method = ExperienceReplay(Identity(FEATURES), nn.Linear, buffer_size=20)
    trainer = fit(method, tmp_path, data)
    trainer.test(method, datamodule=data)
    assert len(read) == 1
    wanted = json.loads((tmp_path / "results.json").read_text())["last_accuracy"]
    model = mh_lightning.load(tmp_path)  # without its buffer, which only a fit needs
    tester = mh_lightning.Trainer(run_dir=tmp_path / "tests", logger=False, accelerator="cpu", pictures=False,
                                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    (found,) = tester.test(model.method, datamodule=part([0, 1, 2, 3]))
    assert found["test/last_accuracy"] == pytest.approx(wanted, abs=1e-6)
