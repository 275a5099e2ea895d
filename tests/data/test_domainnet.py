"""DomainNet's sketches, on a tiny archive and lists written here."""

from pathlib import Path

import pytest

from mh_lightning.data import DomainNetSketch
from tests.data.packed import picture, zip_of
from tests.data.refusal import refused_stream

TRAIN = [
    "sketch/aircraft_carrier/1.jpg 0",
    "sketch/bee/1.jpg 1",
    "sketch/The Eiffel Tower/1.jpg 2",
    "sketch/bee/2.jpg 1",
]
TEST = ["sketch/The Eiffel Tower/2.jpg 2", "sketch/aircraft_carrier/2.jpg 0", "sketch/bee/3.jpg 1"]


def write(root: Path, train: list[str] = TRAIN, test: list[str] = TEST) -> DomainNetSketch:
    (root / "sketch.zip").write_bytes(
        zip_of({line.rpartition(" ")[0]: picture(place) for place, line in enumerate(TRAIN + TEST)})
    )
    for split, lines in (("train", train), ("test", test)):
        (root / f"sketch_{split}.txt").write_text("\n".join(lines) + "\n")
    stream = DomainNetSketch(str(root), increment=1)
    stream.prepare_data()
    return stream


def test_reads_the_lists(tmp_path: Path) -> None:
    splits = write(tmp_path).load()
    assert splits.class_names == ["aircraft_carrier", "bee", "The Eiffel Tower"]
    for part, lines in ((splits.train, TRAIN), (splits.test, TEST)):
        assert part.inputs == [str(tmp_path / line.rpartition(" ")[0]) for line in lines]
        assert part.labels.tolist() == [int(line[-1]) for line in lines]


@pytest.mark.parametrize(
    ("train", "test", "parts"),
    [
        ([*TRAIN, "sketch/bee/9.jpg 1"], TEST, ("sketch_train.txt", "sketch/bee/9.jpg", "is not in")),
        ([*TRAIN, "sketch/bee/1.jpg 2"], TEST, ("sketch_train.txt", "number 2", "'bee'", "'The Eiffel Tower'")),
        (TRAIN, [*TEST, "sketch/bee/1.jpg 4"], ("sketch_test.txt", "sketch/bee/1.jpg", "none of the 4 classes")),
        (TRAIN, [*TEST, "sketch/bee/1.jpg -1"], ("sketch_test.txt", "none of the 4 classes")),
        (TRAIN, TEST[1:], ("'The Eiffel Tower'", "no test image")),
        (TRAIN[1:], TEST, ("'aircraft_carrier'", "no train image")),
        (["sketch/bee/1.jpg"], TEST, ("sketch_train.txt", "cannot be read")),
        ([], [], ("sketch_train.txt", "lists no image")),
    ],
)
def test_refused(train: list[str], test: list[str], parts: tuple[str, ...], tmp_path: Path) -> None:
    refused_stream(write(tmp_path, train, test), "data.root", *parts)


@pytest.mark.parametrize("name", ["sketch_train.txt", "sketch_test.txt"])
def test_missing_list(name: str, tmp_path: Path) -> None:
    stream = write(tmp_path)
    (tmp_path / name).unlink()
    refused_stream(stream, f"data.root='{tmp_path}' lacks {name}", "sketch.zip", "root/train/<class>/")
