"""The benchmarks run, at toy size; how fast anything is, no test asks."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import (
    class_covariances,
    closed_form,
    cost_rule,
    heads_held_out,
    long_streams,
    ridge_memory,
    ridge_memory_ablations,
    training_step,
    units_against_one,
)
from mh_lightning.functional import grouped
from mh_lightning.heads import RidgeMemoryUnits
from tests.blobs import CLASSES, FEATURES, blobs

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


def test_units_against_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(900, 2, generator=generator)
    board = {"x_train": x, "y_train": x.long().sum(dim=1) % 2, "domain_train": (x[:, 0] > 2).long()}
    torch.save(board, tmp_path / "board.pt")
    plain = ["--features", str(tmp_path / "board.pt"), "--orders", "2", "--normalization", "none"]
    assert all(0.2 < gain < 0.6 for gain in units_against_one.main([*plain, "--units", "40"]))
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert units_against_one.main([*plain, "--units", "1"]) == [0, 0]
    train, validation = units_against_one.stream(board, 0, 1)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(900)) and len(validation) == 180
    assert board["domain_train"][train].diff().min() == 0  # one domain after the other


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


def test_ridge_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--samples", "60", "--features", "6", "--classes", "3", "--batch_size", "8", "--units", "3")
    results = ridge_memory.main([*sizes])
    assert all(math.isfinite(value) and value > 0 for value in results.values())
    assert results["error, rank-b updates, float64"] < 1e-9 < results["error, rank-b updates, float32"] < 1e-2
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in results)


def test_ridge_memory_ablations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features = ridge_memory_ablations.FEATURES
    samples = ridge_memory.clouds(300, features, ridge_memory_ablations.CLASSES)
    monkeypatch.setattr(ridge_memory_ablations, "all_features", lambda *_: samples)
    only = ["rank 16 and diagonal", "units of 200 directions", "keys by k-means beforehand", "streaming LDA"]
    found = ridge_memory_ablations.main(["--orders", "1", "--only", *only, "--output", str(tmp_path)])
    assert [*found] == [ridge_memory_ablations.BASE, *only]
    # whatever the units are, those of so few samples leave the answer to one regression
    assert all(0.9 < values[0] <= 1 for values in found.values())
    rows = (tmp_path / "ablations.csv").read_text().splitlines()[1:]
    sizes = {row.split(",")[0]: int(row.split(",")[2]) for row in rows}
    saved = sizes[ridge_memory_ablations.BASE] - sizes["rank 16 and diagonal"]
    matrix = 4 * (features + 1) ** 2  # ten of them against one, and ten times 16 vectors and a diagonal
    assert saved == 9 * matrix - 4 * 10 * 17 * (features + 1)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in [ridge_memory_ablations.BASE, *only])


def test_one_gram_for_all_units() -> None:
    full, one = RidgeMemoryUnits(FEATURES, CLASSES, 4), ridge_memory_ablations.OneGramUnits(FEATURES, CLASSES, 4)
    x, targets = blobs(400, 1)
    for head in (full, one):
        head.update(x, targets)
        head.ensure_solved()
    total = full.total_gram()
    torch.testing.assert_close(one.total_gram(), total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.gram.sum(dim=0).double(), total, rtol=1e-4, atol=1e-4)
    for unit in range(4):  # the same mean and mass, another covariance
        torch.testing.assert_close(one.gram[unit][-1], full.gram[unit][-1], rtol=1e-4, atol=1e-4)
        assert bool((torch.linalg.eigvalsh(one.gram[unit].double()) > -1e-6).all())
    assert one.state_bytes < full.state_bytes
    agreement = (one(x).argmax(dim=1) == full(x).argmax(dim=1)).float().mean()
    assert 0.8 < float(agreement) < 1


def test_small_units_correct_the_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge_memory_ablations, "CLASSES", 2)
    x = torch.rand(600, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 1, 1, 1, 1, 1])
    targets = x[:, 0].long() % 2  # which no linear map can tell
    head = ridge_memory_ablations.SmallUnits(torch.eye(6)[:, :3], kept=False)
    head.whole.normalization = "none"
    head.update(x, targets)
    logits = head(x)
    right, of_the_shared_one = ((one.argmax(dim=1) == targets).float().mean() for one in (logits, head.whole(x)))
    assert of_the_shared_one < 0.7 < 0.85 < right
    units = RidgeMemoryUnits(3, 2, normalization="none")  # of the directions alone
    units.update(x[:, :3], targets)
    one = RidgeMemoryUnits(3, 2, 1, normalization="none")
    one.update(x[:, :3], targets)
    corrections = units(x[:, :3]) - one(x[:, :3])
    torch.testing.assert_close(logits, head.whole(x) + corrections, rtol=1e-4, atol=1e-4)


def test_cut_back_keeps_a_low_rank_and_the_diagonal() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    torch.testing.assert_close(ridge_memory_ablations.cut_back(x[:3].T @ x[:3], 3), x[:3].T @ x[:3])
    torch.testing.assert_close(ridge_memory_ablations.cut_back(gram, 2).diagonal(), gram.diagonal())


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_step.main(["--sizes", "4,6,3"])
    assert "4,6,3" in capsys.readouterr().err


def test_class_covariances(fashion_mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--data.init_args.max_train_samples=40", "--data.init_args.max_test_samples=20",
             "--data.init_args.epochs_per_task=1", "--model.init_args.backbone.init_args.image_size=32",
             "--model.init_args.alignment.samples_per_class=2", "--model.init_args.alignment.epochs=1",
             "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false")  # fmt: skip
    folders = ("--root", str(fashion_mnist), "--features", str(fashion_mnist / "features"))
    rows = class_covariances.main([*folders, "--seeds", "0", *small])
    assert rows["full"]["mean error"] == 0 < rows["low_rank 8"]["mean error"] < 1 < rows["full"]["bytes"]
    assert rows["full"]["bytes"] > rows["low_rank 256"]["bytes"] > rows["low_rank 8"]["bytes"]
    assert "| shared |" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("tasks", "--tasks", "6"), ("samples", "--samples", "80")])
def test_long_streams(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = long_streams.main([*options]).values()
    assert all(math.isfinite(value) for value in found.values())
    assert found["seconds"] > 0 and found["MB at the end"] > 50
    assert f"{options[2]} {options[0]}: " in capsys.readouterr().out
