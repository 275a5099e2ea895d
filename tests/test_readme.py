"""What the README shows works as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_configs import SMALL, write_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.filterwarnings("error")
def test_python_example() -> None:
    exec(block("python"), {})


def test_yaml_example(run: Callable[..., Path], tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    config = tmp_path / "my.yaml"
    config.write_text(block("yaml").replace("pretrained: true", "pretrained: false"))
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
    configs = set(re.findall(r"configs/\w+\.yaml", README))
    assert len(configs) >= 3
    assert all((ROOT / config).exists() for config in configs)
