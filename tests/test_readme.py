"""What the README shows works as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mh_lightning.experiments.__main__ import experiments_of, parse
from tests.test_configs import SMALL, write_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str, place: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[place]


def test_a_fit_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("python", 0), names)
    assert f"{names['results']['average_accuracy']:.3f}".removeprefix("0") in README
    assert (tmp_path / "runs" / "my_first" / "version_0" / "accuracy_matrix.png").exists()


@pytest.mark.filterwarnings("error")
def test_the_layer_in_python() -> None:
    exec(block("python", 1), {})


def test_yaml_example(run: Callable[..., Path], tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    config = tmp_path / "my.yaml"
    config.write_text(block("yaml", 1).replace("pretrained: true", "pretrained: false"))
    options = ("--data.init_args.root", str(tmp_path / "images"), "--data.init_args.increment", "1")
    assert (run("fit", config, *options, *SMALL) / "results.json").exists()


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        path, _, place = link.partition("#")
        assert (ROOT / path).exists()
        if place:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            assert place in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_commands_name_existing_files() -> None:
    kinds = ("streams", "methods", "backbones", "heads", "tables", "search_spaces")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
    named = {name for page in pages for name in re.findall(rf"(?:{'|'.join(kinds)})/\w+\.yaml", page.read_text())}
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / "configs" / name).is_file()]


def test_the_table_is_understood(tmp_path: Path) -> None:
    (tmp_path / "my_method.yaml").write_text((ROOT / "configs" / "methods" / "ncm.yaml").read_text())
    table = tmp_path / "my_table.yaml"
    table.write_text(block("yaml", 0))
    names = [one.name for one in experiments_of(parse(["run", "--table", str(table), "--output", "unused"]).run)]
    assert names[0] == "digits_ncm" and names[-1] == "digits_narrow" and len(names) == 11
