"""A long-lived learner that is killed."""

import io
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

import mh_lightning
from mh_lightning.backbones import TimmBackbone
from mh_lightning.data import Tensors
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm
from tests.fits import fit

SERVICE = Path(__file__).parents[1] / "examples" / "service.py"
COLOURS = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cat": (40, 40, 200)}


def picture(name: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    seed_everything(0)
    x = torch.from_numpy(np.stack([np.array(picture(name, seed)) for seed in range(4) for name in ("ant", "bee")]))
    y = torch.arange(8) % 2
    backbone = TimmBackbone("test_resnet", image_size=32)
    fit(ClosedForm(backbone, ClassMeans), folder, Tensors(x, y, x, y, class_names=["ant", "bee"]))
    mh_lightning.load(folder).save(folder / "start.mh")
    return folder / "start.mh"


def start(folder: Path, source: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SERVICE), "--from", str(source), "--folder", str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def drop(folder: Path, name: str, seed: int) -> None:
    path = folder / "learn" / name / f"{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    picture(name, seed).save(partial, "PNG")
    partial.rename(path)


def test_learns_answers_and_refuses(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    for seed in range(10, 16):
        drop(folder, "cat", seed)
    (folder / "learn" / "cat" / "bad.png").write_bytes(b"no picture")
    (folder / "learn" / "stray.png").write_bytes(b"no class")
    (folder / "ask").mkdir()
    for name in COLOURS:
        picture(name, 99).save(folder / "ask" / f"{name}.png")
    process = start(folder, trained, "--once")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "ready: 2 classes" in out
    answers = {path.name: json.loads(path.read_text()) for path in (folder / "answers").glob("*.json")}
    assert {name: answers[f"{name}.png.json"]["class"] for name in COLOURS} == {name: name for name in COLOURS}
    assert sorted(path.name for path in (folder / "learnt" / "cat").iterdir()) == [
        f"{seed}.png" for seed in range(10, 16)
    ]
    assert "cannot be read" in (folder / "refused" / "bad.png.txt").read_text()
    assert "lies in no folder of a class" in (folder / "refused" / "stray.png.txt").read_text()
    model = mh_lightning.load(folder / "model.mh")
    assert model.class_names == ["ant", "bee", "cat"] and model.method.head.counts.tolist() == [4, 4, 6]  # type: ignore[union-attr,operator]


def test_nothing_is_lost_or_learnt_twice_when_it_is_killed(trained: Path, tmp_path: Path) -> None:
    folder, dice, seed = tmp_path / "learner", random.Random(0), 100
    dropped = {"ant": 0, "bee": 0, "cat": 0}
    acknowledged = 0
    for kill in range(10):
        process = start(folder, trained)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        for _ in range(dice.randrange(5, 25)):
            name = dice.choice([*COLOURS])
            drop(folder, name, seed)
            dropped[name], seed = dropped[name] + 1, seed + 1
        time.sleep(dice.uniform(0.2, 0.9) if kill else 1.5)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        learnt = sum(1 for _ in (folder / "learnt").rglob("*.png"))
        model = mh_lightning.load(folder / "model.mh")
        counts = model.method.head.counts.sum().item()  # type: ignore[union-attr,operator]
        assert counts - 8 >= learnt >= acknowledged
        acknowledged = learnt
    process = start(folder, trained, "--once")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    model = mh_lightning.load(folder / "model.mh")
    found = dict(zip(model.class_names, model.method.head.counts.tolist(), strict=True))  # type: ignore[union-attr,operator]
    assert found == {"ant": 4 + dropped["ant"], "bee": 4 + dropped["bee"], "cat": dropped["cat"]}
    assert sum(1 for _ in (folder / "learnt").rglob("*.png")) == sum(dropped.values())


def test_images_come_by_http(trained: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "learner"
    process = start(folder, trained, "--port", str(port))
    try:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()

        def post(path: str, content: bytes) -> tuple[int, dict[str, str]]:
            request = Request(f"http://127.0.0.1:{port}{path}", data=content, method="POST")
            for _ in range(50):
                try:
                    with urlopen(request, timeout=30) as answer:
                        return answer.status, json.loads(answer.read())
                except HTTPError as error:
                    return error.code, json.loads(error.read())
                except URLError:  # it does not listen yet
                    time.sleep(0.2)
            raise AssertionError("nobody listens")

        def bytes_of(name: str, seed: int) -> bytes:
            content = io.BytesIO()
            picture(name, seed).save(content, "PNG")
            return content.getvalue()

        for seed in range(4):
            assert post("/learn/cat", bytes_of("cat", seed))[0] == 202
        for _ in range(100):
            status, answer = post("/ask", bytes_of("cat", 50))
            if answer.get("class") == "cat":
                break
            time.sleep(0.1)
        assert status == 200 and answer["class"] == "cat"
        status, answer = post("/ask", b"no picture")
        assert status == 422 and "cannot be read" in answer["detail"]
        assert post("/learn/..%2F..", bytes_of("cat", 1))[0] in (404, 422)
    finally:
        process.kill()
        process.communicate()


def test_a_start_from_nothing_is_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SERVICE), "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "name a run to start from" in done.stderr
