"""The benchmarks run, at toy size; how fast anything is, no test asks."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import (
    closed_form,
    cost_rule,
    feature_cache,
    heads_held_out,
    long_streams,
    many_images,
    online_stream,
    trainer_steps,
    training_step,
)
from docs.closed_form_cost_figure import main as figure_of_costs
from mh_lightning.functional import grouped
from tests.fashion_mnist import write_fashion_mnist

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


def test_cost_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = grouped.GROUPING["cpu"]
    results = cost_rule.main([*SIZES, "--json", str(tmp_path / "results.json")])
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["forward"] for row in written["rule_loses"]] == [row["forward"] for row in results]
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


TOY = ("--samples", "30", "--batch_size", "8", "--projections", "10", "--units", "10", "--max_bytes", "10000",
       "--repeats", "1")  # fmt: skip


def test_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    rows = closed_form.main([*TOY, "--features", "6", "--classes", "3"])
    printed = capsys.readouterr().out
    assert len(rows) == 10 and all(math.isfinite(row["with_solution"]) and row["with_solution"] > 0 for row in rows)
    assert all(row["head"] in printed and row["bytes"] > 0 for row in rows if row["head"] != "naive")


def test_how_closed_forms_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["ClassMeans", "ShrunkClassCovariances"]
    options = ("--growth", "--features", "4", "6", "--classes", "2", "3", "--heads", *wanted)
    rows = closed_form.main([*TOY, *options, "--json", str(tmp_path / "rows.json"), "--most_gigabytes", "0.001"])
    printed = capsys.readouterr().out
    assert [(row["head"], row["features"], row["classes"]) for row in rows] == [
        ("ClassMeans", 768, 2), ("ClassMeans", 768, 3), ("ClassMeans", 4, 100), ("ShrunkClassCovariances", 4, 100),
        ("ClassMeans", 6, 100), ("ShrunkClassCovariances", 6, 100)]  # fmt: skip
    assert printed.count("left out, its state would take") == 2
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == rows and written["machine"]["device"] == "cpu"
    figure_of_costs(tmp_path / "rows.json", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_many_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = many_images.main(["--files", "30", "--json", str(tmp_path / "results.json")])
    assert all(value > 0 for value in results["seconds"].values()) and "30 of 4096 bytes" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == results["seconds"]


def test_trainer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--only", "features", "--samples", "200", "--features", "6", "--units", "5", "--batch_size", "16")
    results = trainer_steps.main([*options, "--repeats", "1", "--profile", "--json", str(tmp_path / "results.json")])
    found = results["features"]
    assert found["ratio"] == found["steps_per_second"]["trainer"] / found["steps_per_second"]["bare"] > 0
    printed = capsys.readouterr().out
    assert f"{found['ratio']:.2f} of the steps of a bare loop" in printed and "ncalls" in printed
    assert json.loads((tmp_path / "results.json").read_text())["features"] == found


def test_the_arithmetic_of_the_quickstart() -> None:
    small = ["--data.init_args.max_train_samples", "40", "--data.init_args.max_test_samples", "20"]
    found = trainer_steps.quickstart(1, small)
    assert found["ratio"] == found["seconds"]["fit"] / found["seconds"]["bare"] > 0


@pytest.mark.parametrize("options", [("tasks", "--tasks", "6"), ("samples", "--samples", "80")])
def test_long_streams(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = long_streams.main([*options]).values()
    assert all(math.isfinite(value) for value in found.values())
    assert found["seconds"] > 0 and found["MB at the end"] > 50
    assert f"{options[2]} {options[0]}: " in capsys.readouterr().out


def test_online_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--samples", "60", "--repeats", "1", "--json", str(tmp_path / "results.json")]
    found = online_stream.main(options)["samples_per_second"][60]
    torch.set_num_threads(threads)
    assert len(found) == 4 and all(rate > 0 for rate in found.values())
    assert "1.00 of a bare loop: bare loop" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["machine"]["torch"] == torch.__version__


def test_feature_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashion_mnist(tmp_path)
    found = feature_cache.main(["--root", str(tmp_path), "--images", "6", "--repeats", "1"])["images_per_second"]
    assert found["ratio"] == found["feature_cache"] / found["plain_loop"] > 0
    assert f"{found['ratio']:.2f} of the images of a plain loop" in capsys.readouterr().out
