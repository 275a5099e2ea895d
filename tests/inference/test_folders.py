"""Folders of images and a trained model, by the command line."""

import csv
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

import mh_lightning
from mh_lightning.backbones import TimmBackbone
from mh_lightning.commands import main
from mh_lightning.data import Tensors
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm
from tests.fits import fit

NAMES = ["ant", "bee", "cat", "<b>dog</b>", "eel", "fox"]


def pictures(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise on the colour of a class."""
    colours = torch.randint(60, 190, (len(NAMES), 3), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % len(NAMES)
    noise = torch.randint(-20, 20, (samples, 24, 32, 3), generator=generator)
    return (colours[targets][:, None, None] + noise).to(torch.uint8), targets


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(0)
    data = Tensors(*pictures(60, 1), *pictures(12, 2), increment=3, class_names=NAMES)
    fit(ClosedForm(TimmBackbone("test_resnet", image_size=32), ClassMeans), folder, data)
    for place, (pixels, target) in enumerate(zip(*pictures(30, 3), strict=True)):
        path = folder / "images" / NAMES[int(target)].replace("/", "") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_predicts_any_images(run: Path, tmp_path: Path) -> None:
    images, table = run / "images" / "ant", tmp_path / "deep" / "predictions.csv"
    (images / ".hidden.png").write_bytes(b"")
    (images / "notes.txt").write_text("no image")
    code = run_command("predict", "--from", run, "--images", images, "--output", table, "--batch_size", 2, "--features")
    (images / ".hidden.png").unlink()
    rows = rows_of(table)
    assert code == 0 and len(rows) == 5 and {row["class"] for row in rows} == {"ant"}
    model = mh_lightning.load(run)
    wanted = model.predict([images / row["file"] for row in rows])
    assert [row["class"] for row in rows] == wanted.labels
    for row, probabilities, features in zip(
        rows, wanted.probabilities, model.features([images / row["file"] for row in rows]), strict=True
    ):
        order = np.argsort(-probabilities, kind="stable")
        names = [row["class"], *(row[f"class_{rank}"] for rank in range(2, 6))]
        said = [row["probability"], *(row[f"probability_{rank}"] for rank in range(2, 6))]
        assert names == [NAMES[place] for place in order[:5]]
        np.testing.assert_allclose([float(one) for one in said], probabilities[order[:5]], atol=1e-6)
        numbers = [float(row[f"feature_{place}"]) for place in range(len(features))]
        np.testing.assert_allclose(numbers, features, rtol=1e-5, atol=1e-6)


class Sources(HTMLParser):
    """Pictures and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(str(dict(attrs)["src"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_photograph(run: Path, tmp_path: Path) -> None:
    image = next((run / "images" / "ant").iterdir())
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--from", str(run), "--images", str(image), "--output", str(tmp_path / "p.csv")])
    (row,) = rows_of(tmp_path / "p.csv")
    assert row["file"] == image.name and row["class"] == "ant" and (tmp_path / "p.html").exists()


def test_what_cannot_be_read_is_named_and_the_rest_predicted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "images", tmp_path / "p.csv"
    folder.mkdir()
    for place, pixels in enumerate(pictures(3, 4)[0]):
        Image.fromarray(pixels.numpy()).save(folder / f"{place}.png")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "9.jpg").write_bytes(b"")
    assert run_command("predict", "--from", run, "--images", folder, "--output", table, "--batch_size", 1) == 1
    assert [row["file"] for row in rows_of(table)] == ["0.png", "2.png"]
    said = capsys.readouterr().err
    assert said.count("not read: ") == 2 and "1.png" in said and "9.jpg" in said
    page = Sources()
    page.feed((tmp_path / "p.html").read_text())
    assert len(page.pictures) == 2 and all(one.startswith("data:image/jpeg;base64,") for one in page.pictures)
    assert "9.jpg" in page.text and "2 images" in page.text


def test_folders_that_are_no_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    moved = tmp_path / "images"
    for name in NAMES:
        (moved / name.replace("/", "")).mkdir(parents=True)
    for path in (run / "images").rglob("*.png"):
        name = path.parent.name if path.name != "0.png" else "bee"
        (moved / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit, match="2"):
        main(["test", "--from", str(run), "--images", str(moved), "--output", str(table)])
    assert "the folders '<b>dog<b>' are no classes" in capsys.readouterr().err


def test_the_accuracy_is_that_of_the_rows(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = tmp_path / "images", tmp_path / "t.csv"
    for place, name in enumerate(["ant", "ant", "bee", "bee"]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shown = "cat" if place == 1 else name
        source = next(iter(sorted((run / "images" / shown).glob("*.png"))[place:]))
        (folder / name / f"{place}.png").write_bytes(source.read_bytes())
    assert run_command("test", "--from", run, "--images", folder, "--output", table, "--no_page") == 0
    said = capsys.readouterr().out
    right = [row["class"] == row["true_class"] for row in rows_of(table)]
    assert right == [True, False, True, True] and not (tmp_path / "t.html").exists()
    assert "\naccuracy: 0.7500\nmean class accuracy: 0.7500\n" in said and "negative log likelihood: " in said
    likelihoods = []
    for path in sorted(folder.rglob("*.png")):
        probabilities = mh_lightning.load(run).predict(path).probabilities[0]
        likelihoods.append(-np.log(probabilities[NAMES.index(path.parent.name)]))
    assert f"negative log likelihood: {np.mean(likelihoods):.4f}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere"], "images='nowhere' is no folder"),
        (["--images", "{empty}"], "holds no image files"),
        (["--images", "{images}", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--images", "{images}", "--device", "abacus"], "device='abacus' is not there"),
        (["--images", "{images}", "--output", "{file}/p.csv"], "cannot be written"),
    ],
)
def test_refuses(words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"empty": tmp_path / "empty", "images": run / "images", "file": tmp_path / "file"}
    assert run_command("predict", "--from", run, *(word.format(**places) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("test", "--from", tmp_path, "--images", tmp_path) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
