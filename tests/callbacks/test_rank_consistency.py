"""Ranks that differ are noticed; ranks that agree are not."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch import multiprocessing as mp

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import RankConsistency, TaskBoundaries
from mh_lightning.callbacks.rank_consistency import checksum
from mh_lightning.data import Tensors
from mh_lightning.errors import UserError
from mh_lightning.methods import FineTuning
from tests.blobs import FEATURES, blobs

RANKS = 2


class MoveMemory(Callback):
    """Moves a weight by one unit in the last place on rank 1, after a step. (Keys would be mended at the next forward,
    where DistributedDataParallel sends buffers around.)
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            weight = pl_module.head.M.detach()[0, 0, :1]
            weight.copy_(torch.nextafter(weight, weight + 1))


def fit(folder: Path, *callbacks: Callback) -> None:
    def head(features: int, classes: int) -> MHLinear:
        return MHLinear(features, classes, key_mem_units=5, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True,
                        tau_alpha=0.99, tau_mu=5, tau_eta=5)  # fmt: skip

    torch.manual_seed(0)
    (x, targets), (x_test, y_test) = blobs(70, 1), blobs(20, 2)
    data = Tensors(x, targets, x_test, y_test, increment=7, batch_size=8)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer = Trainer(accelerator="cpu", devices=RANKS, strategy=strategy, max_epochs=-1, logger=False,
                      reload_dataloaders_every_n_epochs=1, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0, use_distributed_sampler=False, enable_checkpointing=False,
                      default_root_dir=folder, callbacks=[TaskBoundaries(), *callbacks])  # fmt: skip
    trainer.fit(FineTuning(Identity(FEATURES), head), data)


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fit(Path(folder), RankConsistency())
    messages = []
    for every in (1, 4):
        try:
            fit(Path(folder), MoveMemory(3), RankConsistency(every))
        except UserError as error:
            messages.append(str(error))
    torch.save(messages, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_differ_are_noticed_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, args=(str(tmp_path), port), nprocs=RANKS, start_method="fork")
    for rank in range(RANKS):
        first, later = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
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
