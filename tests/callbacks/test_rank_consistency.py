"""Ranks that differ are noticed; ranks that agree are not."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import RankConsistency
from mh_lightning.callbacks.rank_consistency import checksum
from mh_lightning.errors import UserError
from mh_lightning.methods import FineTuning
from tests import fits
from tests.blobs import FEATURES
from tests.fits import RANKS, on_two_ranks, stream


class MoveMemory(Callback):
    """Moves a weight of each unit on rank 1 after a step, at least by one unit in the last place, which later steps may
    round away. (A single unit may be recycled.)
    """

    def __init__(self, step: int, distance: float = 0.0) -> None:
        self.step, self.distance = step, distance

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            weight = pl_module.head.M.detach()[0, :, :1]
            weight.copy_(torch.nextafter(weight, weight + 1) + self.distance)


def fit(folder: Path, *callbacks: Callback) -> None:
    def head(features: int, classes: int) -> MHLinear:
        return MHLinear.published(features, classes, key_mem_units=5, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA",
                scramble=True,
                        tau_alpha=0.99, tau_mu=5, tau_eta=5)  # fmt: skip

    torch.manual_seed(0)
    data = stream(scenario="IID")
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    fits.fit(FineTuning(Identity(FEATURES), head), folder, data, devices=RANKS, strategy=strategy,
             enable_checkpointing=False, callbacks=callbacks)  # fmt: skip


def work(rank: int, folder: Path) -> list[str]:
    fit(folder / "alike", RankConsistency())
    messages = []
    for every, distance in ((1, 0.0), (4, 0.1)):
        try:
            fit(folder / str(every), MoveMemory(3, distance), RankConsistency(every))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_ranks_that_differ_are_noticed_at_once(tmp_path: Path) -> None:
    for first, later in on_two_ranks(work, tmp_path):
        assert first.startswith("RankConsistency: after step 3, 'head.M' on rank [1] differs from that on rank 0")
        assert later.startswith("RankConsistency: after step 4, ")


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.data())
def test_every_bit_counts(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    changed = tensor.clone()
    bits = changed.view(torch.int32)
    place = data.draw(st.integers(0, len(values) - 1))
    bits[place] ^= 1 << data.draw(st.integers(0, 30))
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(changed)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.int64, torch.complex64]
)
def test_every_type(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 2).to(dtype)
    assert checksum(tensor) != checksum(torch.zeros(3, 2).to(dtype))
    assert checksum(torch.empty(0, dtype=dtype)) == 0


def test_checks_need_a_distance() -> None:
    with pytest.raises(UserError, match="every_n_steps must be at least 1, got 0"):
        RankConsistency(0)
