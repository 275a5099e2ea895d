"""Long streams: whether memory stays flat and time linear, over 10,000 tasks and over 1,000,000 samples.

    python -m benchmarks.long_streams [tasks] [samples] [--tasks 10000] [--samples 1000000]

Runs the whole command line in this process, with its loggers, checkpoints, callbacks and pictures, on one thread, and
looks at the memory of the process (RSS) and at the clock after each hundredth of the stream. "tasks" is a
domain-incremental stream of tiny tasks, evaluated forty times; "samples" an online stream of ten tasks of a
plane, one sample an optimizer step, in chunks. Both train a Memory Head.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from benchmarks.report import parser, report
from mh_lightning.cli import main as fit

CLASSES, EVALUATIONS = 4, 40
MEMORY_HEAD = {
    "key_mem_units": 10, "delta": 2, "distance": "euclidean", "gamma_alpha": 25.0, "upd_m": "WTA",
    "upd_k": "ad_hoc_WTA", "beta_k": 0.01, "scramble": True, "tau_alpha": 0.95, "tau_mu": 50, "tau_eta": 50,
}  # fmt: skip


class Watch(Callback):
    """Notes the seconds and the bytes in memory whenever another hundredth of the stream was learnt."""

    noted: list[tuple[float, int]]

    def __init__(self) -> None:
        Watch.noted = []
        self._learnt = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not self._learnt:
            self._all = sum(stream.num_samples("train", task) for task in range(stream.num_tasks))
            self.noted.append((time.monotonic(), resident_bytes()))
        self._learnt += len(batch[1])
        if self._learnt * 100 // self._all >= len(self.noted):
            self.noted.append((time.monotonic(), resident_bytes()))


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def toy(path: Path, domains: int, samples: int, test_samples: int) -> None:
    """Four blobs in a plane, which wander from domain to domain, with so many samples in each domain."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(domains, CLASSES, generator=generator) * 6.2832
    centres = torch.stack([angles.cos(), angles.sin()], dim=2)
    tensors = {}
    for split, number in (("train", samples), ("test", test_samples)):
        domain = torch.arange(domains).repeat_interleave(number)
        label = torch.arange(len(domain)) % CLASSES
        tensors[f"x_{split}"] = centres[domain, label] + 0.1 * torch.randn(len(domain), 2, generator=generator)
        tensors |= {f"y_{split}": label, f"domain_{split}": domain}
    save_file(tensors, path)


def settings(folder: Path, domains: int, samples: int, test_samples: int, **data: Any) -> dict[str, Any]:
    """The configuration of a Memory Head on a stream of so many tasks, with so many samples in each."""
    toy(folder / "toy.safetensors", domains, samples, test_samples)
    return {
        "seed_everything": 0,
        "num_threads": 1,
        "model": {
            "class_path": "mh_lightning.methods.FineTuning",
            "init_args": {
                "backbone": {"class_path": "mh_lightning.backbones.Identity", "init_args": {"num_features": 2}},
                "head": {"class_path": "mh_lightning.MHLinear", "init_args": MEMORY_HEAD},
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "mh_lightning.data.TensorFile",
            "init_args": {"path": str(folder / "toy.safetensors"), "scenario": "DI", "increment": CLASSES, **data},
        },
        "trainer": {"accelerator": "cpu"},
    }


def run(folder: Path, **stream: Any) -> dict[str, float]:
    """Fit a stream, and measure it."""
    configuration = settings(folder, **stream)
    configuration["trainer"]["callbacks"] = [{"class_path": "benchmarks.long_streams.Watch"}]
    config = folder / "long.yaml"
    config.write_text(yaml.safe_dump(configuration))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit(["fit", "--config", str(config), "--run_dir", str(folder / "runs")])
    return summary(Watch.noted)


def summary(noted: list[tuple[float, int]]) -> dict[str, float]:
    """What the notes say: seconds, memory in the middle and at the end, each the median of a tenth of the notes since
    evaluations and figures come and go, and how the halves compare.
    """
    times, resident = zip(*noted, strict=True)
    half, tenth = len(noted) // 2, 1 + len(noted) // 10
    around_middle = statistics.median(resident[half - tenth // 2 : half + 1 + tenth // 2])
    at_end = statistics.median(resident[-tenth:])
    return {
        "seconds": times[-1] - times[0],
        "MB in the middle": around_middle / 1e6,
        "MB at the end": at_end / 1e6,
        "growth over the second half (%)": 100 * (at_end / around_middle - 1),
        "time of the second half to the first": (times[-1] - times[half]) / (times[half] - times[0]),
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    given = parser(__doc__)
    given.add_argument("streams", nargs="*", choices=[[], "tasks", "samples"], help="by default both")
    given.add_argument("--tasks", type=int, default=10_000)
    given.add_argument("--samples", type=int, default=1_000_000)
    options = given.parse_args(arguments)
    streams: dict[str, dict[str, Any]] = {
        "tasks": {"domains": options.tasks, "samples": 16, "test_samples": 4, "batch_size": 8,
                  "evaluate_every_n_tasks": max(1, options.tasks // EVALUATIONS)},
        "samples": {"domains": 10, "samples": options.samples // 10, "test_samples": 400, "batch_size": 1,
                    "chunk_size": 1000},
    }  # fmt: skip
    results = {}
    for name in options.streams or streams:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(Path(folder), eval_batch_size=1024, **streams[name])
        print(f"{getattr(options, name)} {name}: ", end="")
        print(", ".join(f"{title} {value:.2f}" for title, value in results[name].items()), flush=True)
    report(options, streams=results)
    return results


if __name__ == "__main__":
    from benchmarks import long_streams  # the callback of the configuration is that module's

    long_streams.main()
