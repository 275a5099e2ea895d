"""Fits of tiny streams in Python, in one process or in several."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import distributed as dist
from torch import multiprocessing as mp

from mh_lightning.callbacks import ContinualMetrics, TaskBoundaries, TaskCheckpoints
from mh_lightning.data import Tensors
from tests.blobs import blobs

RANKS = 2


def stream(**options: Any) -> Tensors:
    """Seven classes in three tasks."""
    (x, targets), (x_test, y_test) = blobs(150, 1), blobs(50, 2)
    defaults: dict[str, Any] = {"first_task_size": 3, "increment": 2, "batch_size": 8}
    return Tensors(x, targets, x_test, y_test, **defaults | options)


def fit(
    method: LightningModule, folder: Path, data: Tensors | None = None, resume: Path | None = None, **options: Any
) -> Trainer:
    """Fit a method, on `stream()` by default, with checkpoints unless `callbacks` are given."""
    defaults: dict[str, Any] = {"enable_progress_bar": False, "callbacks": [TaskCheckpoints()], "devices": 1}
    options = defaults | options
    options["callbacks"] = [TaskBoundaries(), ContinualMetrics(figures=False), *options["callbacks"]]
    trainer = Trainer(accelerator="cpu", max_epochs=-1, reload_dataloaders_every_n_epochs=1, logger=False,
                      enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
                      default_root_dir=folder, **options)  # fmt: skip
    trainer.fit(method, data or stream(), ckpt_path=resume)
    return trainer


def on_ranks(ranks: int, work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns in each of some processes that can form a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, since to import the trainer anew takes longer than all the rest
    mp.start_processes(_work_of_rank, args=(work, folder, port), nprocs=ranks, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _work_of_rank(rank: int, work: Callable[[int, Path], Any], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(work(rank, folder), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """As `on_ranks`, of two."""
    return on_ranks(RANKS, work, folder)
