"""NWPU-RESISC45's folder and archives, on tiny ones written here."""

from pathlib import Path

import pytest

from mh_lightning.data import RESISC45
from tests.data.packed import images_of, packed, write_files
from tests.data.refusal import refused

FILES = images_of({"island": 5, "airport": 5, "sea_ice": 10}, "NWPU-RESISC45/")


@pytest.mark.parametrize("name", ["NWPU-RESISC45.zip", "NWPU-RESISC45.tar", "NWPU-RESISC45.tar.gz", "NWPU-RESISC45"])
def test_folder_or_archive(name: str, tmp_path: Path) -> None:
    if name == "NWPU-RESISC45":
        write_files(tmp_path, FILES)
    else:
        (tmp_path / name).write_bytes(packed(name, FILES))
    (tmp_path / "NWPU-RESISC45.rar").write_bytes(b"where they come from")
    stream = RESISC45(str(tmp_path))
    stream.prepare_data()
    splits = stream.load()
    assert splits.class_names == ["airport", "island", "sea_ice"]
    assert splits.test.labels.tolist() == [0, 1, 2, 2] and len(splits.train.labels) == 16
    assert {*splits.train.inputs, *splits.test.inputs} == {str(tmp_path / path) for path in FILES}


def test_rar_is_unpacked_by_hand(tmp_path: Path) -> None:
    (tmp_path / "NWPU-RESISC45.rar").write_bytes(b"Rar!")
    refused(RESISC45(str(tmp_path)).prepare_data, "data.root", "NWPU-RESISC45.rar", "by hand", "folder NWPU-RESISC45")
