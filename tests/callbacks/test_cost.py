"""A limit on what a method keeps."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mh_lightning
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import CostMonitor
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.methods import ExperienceReplay, FineTuning, LwF
from mh_lightning.methods.base import ContinualMethod
from tests.blobs import CLASSES, FEATURES, blobs

HEAD = 4 * CLASSES * (FEATURES + 1)  # bytes of a linear layer


def fit(method: ContinualMethod, folder: Path, limit: int | None) -> int:
    (x, y), (q, v) = blobs(80, 1), blobs(30, 2)
    stream = Tensors(x, y, q, v, increment=4, last_task_size=3, batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "pictures": False}
    found = mh_lightning.fit(method, stream, run_dir=folder, callbacks=[CostMonitor(limit)], accelerator="cpu", **quiet)
    return int(found["cost"]["state_bytes"])


def test_what_fits_is_learnt(tmp_path: Path) -> None:
    assert fit(FineTuning(Identity(FEATURES), nn.Linear), tmp_path, HEAD) == HEAD


def test_what_is_too_large_is_refused_before_it_learns(tmp_path: Path) -> None:
    method = ExperienceReplay(Identity(FEATURES), nn.Linear, buffer_size=30)
    with pytest.raises(UserError, match=rf"max_state_bytes={HEAD}: .* ExperienceReplay takes \d+ bytes before"):
        fit(method, tmp_path, HEAD)
    assert method.replay_buffer is not None and method.replay_buffer.seen == 0


def test_what_grows_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LwF takes \d+ bytes after task 1"):
        fit(LwF(Identity(FEATURES), nn.Linear), tmp_path, 2 * HEAD - 1)
    assert fit(LwF(Identity(FEATURES), nn.Linear), tmp_path, 2 * HEAD) == 2 * HEAD
    with pytest.raises(UserError, match="max_state_bytes"):
        CostMonitor(0)


def test_no_limit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert fit(FineTuning(Identity(FEATURES), nn.Linear), tmp_path, None) == HEAD
