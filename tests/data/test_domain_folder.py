"""Folders of images in several domains, on tiny files written here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mh_lightning.data import DomainFolder
from tests.data.refusal import refused


def write_domains(root: Path, domains: tuple[str, ...] = ("photo", "art", "sketch"), train: int = 4) -> Path:
    """Two classes in each domain."""
    for number, domain in enumerate(domains):
        for split, samples in (("train", train), ("test", 2)):
            for label, name in enumerate(("cat", "ant")):
                folder = root / domain / split / name
                folder.mkdir(parents=True)
                for index in range(samples):
                    grey = np.full((8, 8, 3), 40 * number + 10 * label + index, dtype=np.uint8)
                    Image.fromarray(grey).save(folder / f"{index}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_domains(tmp_path / "images")


def test_domains_are_in_alphabetical_order_or_in_that_which_is_asked_for(root: Path) -> None:
    splits = DomainFolder(str(root)).load()
    assert splits.class_names == ["ant", "cat"]
    assert splits.train.domains is not None and splits.train.domains.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert splits.train.labels.tolist() == ([0] * 4 + [1] * 4) * 3 and splits.test is not None
    assert [Path(path).parts[-4] for path in splits.train.inputs[::8]] == ["art", "photo", "sketch"]
    splits = DomainFolder(str(root), domains=["sketch", "art"]).load()
    assert [Path(path).parts[-4] for path in splits.train.inputs[::8]] == ["sketch", "art"]


@pytest.mark.parametrize(("scenario", "tasks"), [("DI", 3), ("CDI", 6), ("CI", 2), ("IID", 1)])
def test_scenarios(root: Path, scenario: str, tasks: int) -> None:
    options = {} if scenario in ("DI", "IID") else {"increment": 1}
    stream = DomainFolder(str(root), scenario=scenario, domains=["photo", "art", "sketch"], **options)
    stream.prepare_data()
    stream.setup("fit")
    assert stream.num_tasks == tasks and stream.num_classes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["photo", "clipart"]}, "has no folder 'clipart'; it has art, photo, sketch"),
        ({"domains": []}, "data.domains must name at least one folder, each once, got []"),
        ({"domains": ["art", "art"]}, "data.domains must name at least one folder, each once"),
    ],
)
def test_refuses_domains(root: Path, options: dict[str, Any], message: str) -> None:
    refused(lambda: DomainFolder(str(root), **options).load(), message)


def test_domains_must_hold_the_same_classes(root: Path) -> None:
    for split in ("train", "test"):
        folder = root / "sketch" / split / "dog"
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    message = "all domains must hold the same classes; 'dog' is not in both 'art' and 'sketch'"
    refused(lambda: DomainFolder(str(root)).load(), message)


def test_a_plain_image_folder_is_told_what_is_expected(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for root in (tmp_path, tmp_path / "nowhere"):
        refused(lambda root=root: DomainFolder(str(root)).load(), "root/<domain>/train/<class>/")
