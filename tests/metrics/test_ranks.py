"""Two processes count like one."""

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

from mh_lightning.metrics import continual_metrics
from tests.metrics.evaluations import assert_same, evaluation

RANKS, TASKS = 2, 3


def shares(after_task: int) -> list[slice]:
    """The rows of each rank: in turn, but after the second task all on the last rank."""
    return [slice(0, 0), slice(None)] if after_task == 1 else [slice(rank, None, RANKS) for rank in range(RANKS)]


def count(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    metrics, results = continual_metrics(TASKS, with_top5=True), []
    for after_task in range(-1, TASKS):
        batch = evaluation(TASKS, after_task)
        rows = shares(after_task)[rank] if ranks > 1 else slice(None)
        metrics.update(*(tensor[rows] for tensor in batch[:3]), after_task)
        if after_task >= 0:
            results.append(dict(metrics.compute()))
    return results


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timeout=timedelta(seconds=60), rank=rank, world_size=RANKS
    )
    torch.save(count(rank, RANKS), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_like_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    expected = count(0, 1)
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(results) == TASKS
        for found, wanted in zip(results, expected, strict=True):
            assert_same(found, wanted)
