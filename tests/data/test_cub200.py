"""CUB-200-2011's archive, on a tiny one written here."""

from pathlib import Path

import pytest

from mh_lightning.data import CUB200
from tests.data.packed import picture, tar_of
from tests.data.refusal import refused_stream

# number, path, class, whether it is for training; neither sorted nor class after class
IMAGES = [
    (1, "001.Black_Albatross/a.jpg", 1, 1),
    (2, "001.Black_Albatross/b.jpg", 1, 0),
    (3, "002.Crested_Auklet/c.jpg", 2, 0),
    (4, "002.Crested_Auklet/d.jpg", 2, 1),
    (6, "003.Red_Cardinal/e f.jpg", 3, 1),
    (5, "003.Red_Cardinal/f.jpg", 3, 0),
    (7, "003.Red_Cardinal/g.jpg", 3, 1),
]
LISTS = {
    "images.txt": "".join(f"{number} {path}\n" for number, path, _, _ in IMAGES),
    "image_class_labels.txt": "".join(f"{number} {label}\n" for number, _, label, _ in IMAGES[::-1]),
    "train_test_split.txt": "".join(f"{number} {train}\n" for number, _, _, train in IMAGES),
    "classes.txt": "1 001.Black_Albatross\n2 002.Crested_Auklet\n3 003.Red_Cardinal\n",
}
SPLIT = LISTS["train_test_split.txt"]


def write(root: Path, **changed: str | None) -> CUB200:
    """The archive, with some lists changed or left out."""
    lists = {name: text for name, text in (LISTS | changed).items() if text is not None}
    files = {f"images/{path}": picture(number) for number, path, _, _ in IMAGES}
    files |= {name: text.encode() for name, text in lists.items()} | {"README": b""}
    content = {"attributes.txt": b"", **{f"CUB_200_2011/{name}": data for name, data in files.items()}}
    (root / "CUB_200_2011.tgz").write_bytes(tar_of(content, "w:gz"))
    stream = CUB200(str(root), increment=1)
    stream.prepare_data()
    return stream


def test_reads_the_lists(tmp_path: Path) -> None:
    stream = write(tmp_path)
    splits = stream.load()
    assert splits.class_names == ["001.Black_Albatross", "002.Crested_Auklet", "003.Red_Cardinal"]
    for part, train in ((splits.train, 1), (splits.test, 0)):
        rows = [row for row in IMAGES if row[3] == train]
        assert part.inputs == [str(tmp_path / "CUB_200_2011" / "images" / row[1]) for row in rows]
        assert part.labels.tolist() == [row[2] - 1 for row in rows]
    stream.setup("fit")
    assert [stream.num_samples("train", task) for task in range(3)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"classes.txt": None}, ("lacks CUB_200_2011/classes.txt", "root/train/<class>/")),
        ({"classes.txt": "1 001.Black_Albatross\n"}, ("none of the 1 classes",)),
        ({"classes.txt": LISTS["classes.txt"] + "4 004.Robin\n"}, ("'004.Robin'", "no train image")),
        ({"classes.txt": "one two\n"}, ("classes.txt", "cannot be read")),
        ({"images.txt": LISTS["images.txt"] + "8 001.Black_Albatross/z.jpg\n"}, ("image number 8", "labels.txt")),
        ({"image_class_labels.txt": LISTS["image_class_labels.txt"] + "9 1\n"}, ("image number 9",)),
        ({"image_class_labels.txt": LISTS["image_class_labels.txt"].replace("4 2", "4 x")}, ("cannot be read",)),
        (
            {"train_test_split.txt": SPLIT.replace("4 1", "4 2")},
            ("split.txt", "cannot be read"),
        ),
        ({"train_test_split.txt": SPLIT.replace("4 1", "4 0")}, ("Auklet'", "no train image")),
        ({"train_test_split.txt": SPLIT.replace("3 0", "3 1")}, ("Auklet'", "no test image")),
        ({"images.txt": LISTS["images.txt"].replace("g.jpg", "h.jpg")}, ("images.txt", "Cardinal/h.jpg", "is not in")),
        ({"images.txt": "\x00\xff"}, ("images.txt", "cannot be read")),
    ],
)
def test_refused(changed: dict[str, str | None], parts: tuple[str, ...], tmp_path: Path) -> None:
    refused_stream(write(tmp_path, **changed), "data.root", *parts)
