"""The pages that are made from the code are those in docs/."""

import re
import runpy
from pathlib import Path

import pytest

from mh_lightning import data, heads, methods
from mh_lightning.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = runpy.run_path(str(DOCS / "pages.py"))["PAGES"]


@pytest.mark.parametrize("name", [*PAGES])
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run python docs/pages.py"


def test_nothing_is_left_out_and_links_lead_somewhere() -> None:
    text = {name: (DOCS / name).read_text() for name in PAGES}
    told = {*re.findall(r"^### (\w+)$", text["methods.md"], re.MULTILINE)}
    assert {"EWC", "ICaRL", "DERPlusPlus", "FineTuning", "ClosedForm", "KernelMemoryUnits", "ClassMeans"} <= told
    assert {name for name in methods.__all__ if name.isupper()} <= told
    assert "KernelMemoryUnits" in heads.__all__ and "Digits" in data.__all__
    for anchor in re.findall(r"\]\(#(\S+?)\)", text["methods.md"]):
        assert anchor in {name.lower() for name in told}
    for metric in METRICS:
        assert f"## {metric}\n" in text["metrics.md"]
    for file in re.findall(r"`((?:methods|streams)/\w+\.yaml)`", "".join(text.values())):
        assert (DOCS.parent / "configs" / file).is_file()


def test_each_section_says_something() -> None:
    for name in PAGES:
        sections = re.split(r"\n##+ ", (DOCS / name).read_text())[1:]
        assert all(len(section.split("\n", 1)[1].strip()) > 20 for section in sections)
