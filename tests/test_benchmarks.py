"""The benchmarks run, at toy size; how fast anything is, no test asks."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import (
    closed_form,
    cost_rule,
    heads_held_out,
    long_streams,
    training_step,
)
from mh_lightning.functional import grouped

SIZES = ("--sizes", "4,6,3,5,2,cosine", "1,6,3,5,1,euclidean", "--seconds", "0")


def test_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = training_step.main([*SIZES, "--profile", "--json", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    assert [(result["b"], result["distance"]) for result in results] == [(4, "cosine"), (1, "euclidean")]
    for result in results:
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in result["seconds"].values())
        assert result["train_ratio"] == result["seconds"]["head"] / result["seconds"]["linear"]
        assert f"{result['train_ratio']:.2f}" in printed
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["results"] == results
    assert written["machine"]["threads"] == 2
    assert "_Blend" in printed  # of the profile


def test_the_published_sizes_are_the_default() -> None:
    assert len(training_step.TABLE) == 7
    for varied in ("m", "o", "b"):
        assert len({getattr(size, varied) for size in training_step.GROWTH}) == 5


def test_cost_rule(capsys: pytest.CaptureFixture[str]) -> None:
    before = grouped.GROUPING["cpu"]
    results = cost_rule.main([*SIZES])
    assert len(results) == 2 and all(loss >= 1 for result in results for loss in result.values())
    assert "4, 6, 3, 5, 2" in capsys.readouterr().out
    assert grouped.GROUPING["cpu"] == before


def test_heads_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = 4 * torch.rand(900, 2, generator=torch.Generator().manual_seed(0))
    torch.save({"x_train": x, "y_train": x.long().sum(dim=1) % 2}, tmp_path / "board.pt")
    kernel = "KernelMemoryUnits(normalization='none', width=0.1)"
    file = str(tmp_path / "board.pt")
    found = heads_held_out.main(["--features", file, "--orders", "2", "--heads", kernel, "ClassMeans"])
    assert min(found[kernel]) > 0.85 and max(found["ClassMeans"]) < 0.65
    printed = capsys.readouterr().out
    assert all(f"| {head} |" in printed for head in found)


def test_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--samples", "30", "--features", "6", "--classes", "3", "--batch_size", "8", "--projections", "10",
             "--units", "10", "--max_bytes", "10000")  # fmt: skip
    results = closed_form.main([*sizes, "--repeats", "1"])
    printed = capsys.readouterr().out
    assert len(results) == 10 and all(math.isfinite(rate) and rate > 0 for rate in results.values())
    assert all(name in printed for name in results if name != "naive")


@pytest.mark.parametrize("options", [("tasks", "--tasks", "6"), ("samples", "--samples", "80")])
def test_long_streams(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = long_streams.main([*options]).values()
    assert all(math.isfinite(value) for value in found.values())
    assert found["seconds"] > 0 and found["MB at the end"] > 50
    assert f"{options[2]} {options[0]}: " in capsys.readouterr().out
