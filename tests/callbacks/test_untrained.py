"""The evaluation before the first task."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from mh_lightning.backbones import Identity
from mh_lightning.errors import UserError
from mh_lightning.heads import ClassMeans
from mh_lightning.methods import ClosedForm, FineTuning
from tests.blobs import CLASSES, FEATURES
from tests.fits import fit, on_two_ranks, stream


def method(seed: int = 0) -> FineTuning:
    torch.manual_seed(seed)
    return FineTuning(Identity(FEATURES), nn.Linear)


def results_in(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "cost")}


def test_forward_transfer_is_measured_against_the_untrained_model(tmp_path: Path) -> None:
    data = stream(evaluate_untrained=True)
    fit(method(), tmp_path / "with", data)
    fit(method(), tmp_path / "without")
    results, plain = results_in(tmp_path / "with"), results_in(tmp_path / "without")
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, CLASSES)
    samples, tasks = data._splits["test"], torch.from_numpy(data._task_of_sample["test"])
    assert samples.features is not None
    right = layer(samples.features).argmax(dim=1) == torch.from_numpy(samples.labels)
    before = [right[tasks == task].double().mean().item() for task in range(3)]
    assert results["untrained_accuracy"] == pytest.approx(before)
    matrix = results["accuracy_matrix"]
    gained = [matrix[0][1] - before[1], matrix[1][2] - before[2]]
    assert results["forward_transfer"] == pytest.approx(sum(gained) / 2)
    # it leaves no other trace, and without it nothing is said
    others = {name: value for name, value in results.items() if name not in ("untrained_accuracy", "forward_transfer")}
    assert others == plain


def test_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    class Counts(Callback):
        checks = 0

        def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
            Counts.checks += 1

    options = {"evaluate_untrained": True, "validation_fraction": 0.2}
    fit(method(), tmp_path / "whole", stream(**options))
    checkpoint = tmp_path / "whole" / "checkpoints" / "task_1.ckpt"
    fit(method(1), tmp_path / "resumed", stream(**options), checkpoint, callbacks=[Counts()])
    assert results_in(tmp_path / "resumed") == results_in(tmp_path / "whole") and Counts.checks == 0
    assert {"forward_transfer", "untrained_accuracy"} <= results_in(tmp_path / "whole")["validation"].keys()
    with pytest.raises(UserError, match="evaluate_untrained True instead of False"):
        fit(method(), tmp_path / "other", stream(validation_fraction=0.2), checkpoint)


def test_a_closed_form_head_that_has_seen_nothing(tmp_path: Path) -> None:
    fit(ClosedForm(Identity(FEATURES), ClassMeans), tmp_path, stream(evaluate_untrained=True), callbacks=[])
    results = results_in(tmp_path)
    assert len(results["untrained_accuracy"]) == 3 and max(results["untrained_accuracy"][1:]) == 0  # class 0 for all
    matrix = results["accuracy_matrix"]
    assert results["forward_transfer"] == pytest.approx((matrix[0][1] + matrix[1][2]) / 2)


def work(rank: int, folder: Path) -> Tensor:
    fit(method(), folder, stream(evaluate_untrained=True), devices=2, strategy="ddp", callbacks=[],
        enable_checkpointing=False)  # fmt: skip
    return torch.zeros(())


def test_two_ranks_count_like_one(tmp_path: Path) -> None:
    on_two_ranks(work, tmp_path)
    fit(method(), tmp_path / "alone", stream(evaluate_untrained=True), callbacks=[])
    alone, both = results_in(tmp_path / "alone"), results_in(tmp_path)
    assert both["untrained_accuracy"] == alone["untrained_accuracy"]
    assert both["forward_transfer"] == pytest.approx(alone["forward_transfer"], abs=1e-6)
