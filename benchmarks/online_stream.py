"""Samples a second of an online stream: MODES with a Memory Head, one sample an optimizer step, one CPU thread.

    python -m benchmarks.online_stream [--samples 1000 20000]

Runs the whole command line in this process and divides the samples by the seconds of its results.json: training,
the evaluation after each task, logs, checkpoints and, where it says so, pictures. Beside it the same stream without
chunks, where the trainer takes each step, and a bare loop of PyTorch that only trains.
"""

import contextlib
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.report import parser, report
from mh_lightning import MHLinear
from mh_lightning.cli import main as fit

CONFIGS = ("--config", "streams/modes_cdi.yaml", "--config", "methods/memory_head_plane.yaml")
HEAD = {
    "key_mem_units": 10, "delta": 2, "distance": "euclidean", "gamma_alpha": 25.0, "upd_m": "WTA",
    "upd_k": "ad_hoc_WTA", "beta_k": 0.01, "scramble": True, "tau_alpha": 0.95, "tau_mu": 50, "tau_eta": 50,
}  # fmt: skip


def command_line(samples: int, *options: str) -> float:
    """Samples a second of `fit`."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fit(["fit", *CONFIGS, "--run_dir", folder, "--num_threads", "1",
                  "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
                  "--data.init_args.num_samples", str(samples), *options])  # fmt: skip
        (results,) = Path(folder).rglob("results.json")
        return samples / float(json.loads(results.read_text())["seconds"])


def bare_loop(samples: int) -> float:
    """Samples a second of a loop that only trains."""
    x, y = torch.rand(samples, 2).split(1), torch.randint(4, (samples,)).split(1)
    head = MHLinear.published(2, 4, **HEAD)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    start = time.perf_counter()
    for point, label in zip(x, y, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(head(point), label).backward()
        optimizer.step()
    return samples / (time.perf_counter() - start)


def measure(samples: int, repeats: int) -> dict[str, float]:
    """Samples a second of each way."""
    torch.set_num_threads(1)
    ways = {
        "chunks, without pictures": lambda: command_line(samples, "--pictures", "false"),
        "chunks, with pictures": lambda: command_line(samples),
        "no chunks, without pictures": lambda: command_line(
            min(samples, 2000), "--pictures", "false", "--data.init_args.chunk_size", "null"
        ),
        "bare loop, training only": lambda: bare_loop(samples),
    }
    found = {name: max(way() for _ in range(repeats)) for name, way in ways.items()}
    bare = found["bare loop, training only"]
    for name, rate in found.items():
        print(f"{rate / bare:.2f} of a bare loop: {name}, {rate:.0f} samples/s ({samples} samples)", flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the results."""
    given = parser(__doc__)
    given.add_argument("--samples", type=int, nargs="+", default=[1000, 20000])
    given.add_argument("--repeats", type=int, default=3, help="the best counts")
    options = given.parse_args(arguments)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    command_line(min(options.samples))  # imports and caches
    return report(options, samples_per_second={number: measure(number, options.repeats) for number in options.samples})


if __name__ == "__main__":
    main()
