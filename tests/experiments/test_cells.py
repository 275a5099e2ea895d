"""Methods on streams, and tables of them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mh_lightning.experiments.__main__ import experiments_of, main, parse
from mh_lightning.experiments.cells import Cells, Planned, planned
from mh_lightning.packaged import packaged

CONFIGS = packaged("configs")


def asked(*words: str) -> list[Planned]:
    return experiments_of(parse(["run", "--seeds", "0", *words, "--output", "unused"]).run)


def split(config: Path) -> tuple[Path, Path]:
    """A whole configuration as a stream and a method."""
    content = yaml.safe_load(config.read_text())
    stream, method = config.with_name("blobs.yaml"), config.with_name("tuning.yaml")
    stream.write_text(yaml.safe_dump({"data": content.pop("data")}))
    method.write_text(yaml.safe_dump(content))
    return stream, method


def test_a_product_and_its_names() -> None:
    found = asked("--streams", "moons_c*", "digits", "--methods", "ncm", "slda", "--overrides", "data.batch_size=4")
    assert [one.name for one in found] == [
        "moons_cdi_ncm", "moons_cdi_slda", "moons_cdid_ncm", "moons_cdid_slda", "moons_ci_ncm", "moons_ci_slda",
        "digits_ncm", "digits_slda",
    ]  # fmt: skip
    assert {one.overrides for one in found} == {("data.batch_size=4",)}
    assert [file.parent.name for file in found[0].files] == ["streams", "methods"]


def test_a_table_is_options_that_the_command_line_overrides() -> None:
    given = parse(["run", "--table", "tables/heads.yaml", "--seeds", "7", "--output", "unused"]).run
    assert given.seeds == ["7"] and given.class_order_seeds == ["0-4"]
    names = [one.name for one in experiments_of(given)]
    assert names[:2] == ["pacs_di_kernel_memory_head_10mb", "pacs_cdi_kernel_memory_head_10mb"]


def test_what_is_overridden_on_the_command_line_comes_last() -> None:
    cells = Cells(["digits"], {"small": "memory_head"}, ["data.batch_size=8"])
    (one,) = planned(cells)
    assert one.name == "digits_small" and one.overrides == ("data.batch_size=8",)
    found = asked("--table", "tables/frozen.yaml", "--overrides", "pictures=true")
    assert {one.overrides[-1] for one in found} == {"pictures=true"}


def test_overrides_of_the_command_come_after_those_of_a_cell_and_these_after_the_table_s(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text((CONFIGS / "methods" / "ncm.yaml").read_text())
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump({
        "seeds": 3, "class_order_seeds": 1993, "overrides": ["data.num_samples=100"],
        "cells": [{"streams": ["modes_ci"], "methods": ["own.yaml"], "overrides": ["data.num_samples=200"]}],
    }))  # fmt: skip
    for words in (["--overrides", "pictures=false", "--table", str(table)],
                  [f"--table={table}", "--overrides", "pictures=false"]):  # fmt: skip
        (one,) = experiments_of(parse(["run", *words, "--output", "unused"]).run)
        assert one.overrides == ("data.num_samples=100", "data.num_samples=200", "pictures=false")
        assert one.files[1] == tmp_path / "own.yaml"  # beside the table
    given = parse(["run", "--seeds", "7", "--table", str(table), "--output", "unused"]).run
    assert given.seeds == ["7"] and given.class_order_seeds == 1993


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("seeds: [yes]", "--seeds: a table must give texts or numbers"),
        ("seeds: []", "--seeds is empty"),
        ("overrides: null\nseeds: [0]", "--overrides"),
        ("seeds: [0]\nseeds: [1]", "given twice"),
        ("seeds: [0]\ncell: []", "cell"),
    ],
)
def test_tables_that_cannot_be_used_get_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, said: str
) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(f"{table}\nstreams: [modes_ci]\nmethods: [ncm]\n")
    assert main(["run", "--table", str(path), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1, told


@pytest.mark.parametrize("override", ["conf=x.yaml", "seed_every=4", "data.help=Modes", "trainer.default_root_dir=x"])
def test_overrides_are_options_by_their_whole_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    words = ["run", "--streams", "modes_ci", "--methods", "ncm", "--seeds", "0", "--overrides", override]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "--overrides:" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_one_batch_is_another_run_than_all_of_them(tmp_path: Path, tiny_config: Path) -> None:
    words = ["run", "--configs", str(tiny_config), "--seeds", "0", "--run_dir", str(tmp_path / "runs")]
    for number in ("1", "1.0"):
        out = str(tmp_path / number)
        assert main([*words, "--output", out, "--overrides", f"trainer.limit_train_batches={number}"]) == 0
    assert (tmp_path / "1" / "runs.csv").read_text() != (tmp_path / "1.0" / "runs.csv").read_text()


@pytest.mark.usefixtures("in_process")
def test_a_table_of_ones_own(tmp_path: Path, tiny_config: Path) -> None:
    stream, method = split(tiny_config)
    (tmp_path / "published.csv").write_text("experiment,value,source\nblobs_slow,0.5,Doe 2024\n")
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump({
        "title": "Two rates", "baseline": "_usual", "reference": "published.csv", "seeds": [3],
        "cells": [{"streams": [str(stream)], "methods": {"usual": str(method)}},
                  {"streams": [str(stream)], "methods": {"slow": str(method)}, "overrides": ["model.optimizer.lr=0"]}],
    }))  # fmt: skip
    words = ["run", "--table", str(table), "--output", str(tmp_path / "out"), "--run_dir", str(tmp_path / "runs")]
    assert main(words) == 0
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["experiment"], row["seed"]) for row in rows] == [("blobs_usual", "3"), ("blobs_slow", "3")]
    assert float(rows[0]["average_accuracy"]) > float(rows[1]["average_accuracy"])
    page = (tmp_path / "out" / "table.md").read_text()
    assert page.startswith("# Two rates\n") and "50.0 (Doe 2024)" in page and "run --table table.yaml" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--streams", "mode_cdi", "--methods", "ncm"], "there is no stream 'mode_cdi'; did you mean modes_cdi?"),
        (["--streams", "digits", "--methods", "qqq"], "there is no method 'qqq'; `mh-lightning list methods` shows"),
        (["--streams", "digits"], "--streams and --methods go together"),
        ([], "nothing to run; give --table"),
        (["--streams", "digits", "digits", "--methods", "ncm"], "two experiments are called 'digits_ncm'"),
        (["--streams", "no.yaml", "--methods", "ncm"], "--streams: 'no.yaml' is no file"),
        (["--table", "tables/ocdo.yaml"], "tables/ocdo.yaml"),
    ],
)
def test_mistakes_get_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], said: str
) -> None:
    assert main(["run", *words, "--seeds", "0", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1, told
    assert not (tmp_path / "out").exists()
