"""What the trainer costs beside the arithmetic: steps a second of a fit, beside those of a bare loop.

    python -m benchmarks.trainer_steps                # features that are there, and the quickstart
    python -m benchmarks.trainer_steps --only features --profile

"Features": one epoch over features in a tensor, batches of 128 of 1,280 numbers, a Memory Head of 100 units, by
`mh_lightning.Trainer` as it comes (loggers, progress bar, callbacks) and by a loop of PyTorch that does the same
optimizer steps and nothing else. Only training is timed, from the first batch of the epoch to the last.

"Quickstart": the whole `fit` of configs/quickstart.yaml, without the imports, beside the sum of its parts' arithmetic,
measured bare in the same process: the backbone over the same batches, and the head's steps on what it gave.
"""

import contextlib
import cProfile
import io
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.nn import functional as F

import mh_lightning
from benchmarks.report import machine, parser, report
from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.cli import main as command_line
from mh_lightning.data import Digits, Tensors
from mh_lightning.methods import FineTuning

CLASSES = 100


class Clock(Callback):
    """Seconds from the first batch of an epoch to its last."""

    def __init__(self) -> None:
        self.begun = self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds += time.perf_counter() - self.begun


def features(samples: int, width: int, units: int, batch: int, repeats: int) -> dict[str, Any]:
    """Steps a second of both, in turn."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, width, generator=generator), torch.randint(CLASSES, (samples,), generator=generator)
    y[:CLASSES] = torch.arange(CLASSES)
    steps = -(-samples // batch)
    found: dict[str, list[float]] = {"trainer": [], "bare": []}
    for _ in range(repeats):
        found["trainer"].append(steps / by_the_trainer(x, y, units, batch))
        found["bare"].append(steps / bare(x, y, units, batch))
    rates = {name: max(values) for name, values in found.items()}
    return {"ratio": rates["trainer"] / rates["bare"], "steps_per_second": rates, "all": found}


def by_the_trainer(x: Tensor, y: Tensor, units: int, batch: int) -> float:
    stream = Tensors(x, y, x[:CLASSES], y[:CLASSES], increment=CLASSES, batch_size=batch)
    head = partial(MHLinear, key_mem_units=units)
    method = FineTuning(Identity(x.shape[1]), head, partial(torch.optim.SGD, lr=0.01))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, silence():
        trainer = mh_lightning.Trainer(run_dir=folder, accelerator="cpu", callbacks=[clock], pictures=False)
        trainer.fit(method, datamodule=stream)
    return clock.seconds


def bare(x: Tensor, y: Tensor, units: int, batch: int) -> float:
    head = MHLinear(x.shape[1], CLASSES, key_mem_units=units)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    order = torch.randperm(len(x))
    begun = time.perf_counter()
    for rows in order.split(batch):
        optimizer.zero_grad()
        F.cross_entropy(head(x[rows]), y[rows]).backward()
        optimizer.step()
    return time.perf_counter() - begun


def quickstart(repeats: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of the whole fit, with options if need be, and of its arithmetic alone, in turn."""
    found: dict[str, list[float]] = {"fit": [], "bare": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            with silence():
                command_line(["fit", "--config", "quickstart.yaml", "--run_dir", folder, "--experiment", "quickstart",
                              *options])  # fmt: skip
            found["fit"].append(time.perf_counter() - begun)
            found["bare"].append(arithmetic(Path(folder) / "quickstart" / "version_0"))
    seconds = {name: min(values) for name, values in found.items()}
    return {"ratio": seconds["fit"] / seconds["bare"], "seconds": seconds, "all": found}


def arithmetic(run: Path) -> float:
    """Seconds of what a run has computed: its backbone and its head, on as many samples in as large batches."""
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    stream = Digits(**{name: value for name, value in data.items() if not isinstance(value, dict)})
    stream.setup("fit")
    learnt = [stream.num_samples("train", task) for task in range(stream.num_tasks)]
    evaluated = sum(stream.num_samples("test", task) for task in range(stream.num_tasks))
    method = mh_lightning.load(run).method
    head, optimizer_of = method.head, method._make_optimizer
    head.train()
    optimizer = optimizer_of(head.parameters())
    size = method.backbone.image_format().size
    images = torch.rand(32, 3, size, size)
    cached = data.get("feature_cache") is not None

    def forwards(samples: int, batch: int) -> Tensor:
        parts = [method.backbone(images.repeat(-(-size // 32), 1, 1, 1)[:size]) for size in sizes(samples, batch)]
        return torch.cat(parts)

    begun = time.perf_counter()
    with torch.no_grad():
        features = forwards(sum(learnt) + evaluated, 32) if cached else None
    for samples in learnt:
        for _ in range(data["epochs_per_task"]):
            for size in sizes(samples, data["batch_size"]):
                with torch.no_grad():
                    x = features[:size] if cached else forwards(size, size)
                optimizer.zero_grad()
                F.cross_entropy(head(x), torch.zeros(size, dtype=torch.long)).backward()
                optimizer.step()
        with torch.no_grad():
            for size in sizes(evaluated, data["eval_batch_size"]):
                head(features[:size] if cached else forwards(size, size))
    return time.perf_counter() - begun


def sizes(samples: int, batch: int) -> list[int]:
    return [min(batch, samples - start) for start in range(0, samples, batch)]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def profiled(work: Callable[[], Any]) -> str:
    """Where the time of some work goes."""
    record = cProfile.Profile()
    record.runcall(work)
    text = io.StringIO()
    pstats.Stats(record, stream=text).sort_stats("tottime").print_stats(30)
    return text.getvalue()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the results."""
    given = parser(__doc__)
    given.add_argument("--only", choices=["features", "quickstart"])
    given.add_argument("--samples", type=int, default=20_000)
    given.add_argument("--features", type=int, default=1280)
    given.add_argument("--units", type=int, default=100)
    given.add_argument("--batch_size", type=int, default=128)
    given.add_argument("--repeats", type=int, default=3, help="the best counts")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--profile", action="store_true", help="print where the time of a fit over features goes, too")
    options = given.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    seed_everything(0, verbose=False)
    sizes_of_run = options.samples, options.features, options.units, options.batch_size
    described, results = machine(), dict[str, Any]()
    try:
        if options.only != "quickstart":
            found = results["features"] = features(*sizes_of_run, options.repeats)
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found["steps_per_second"].items())
            print(f"{found['ratio']:.2f} of the steps of a bare loop, features that are there; steps/s: {rates}")
        if options.only != "features":
            found = results["quickstart"] = quickstart(options.repeats)
            parts = ", ".join(f"{name} {value:.1f}" for name, value in found["seconds"].items())
            print(f"{found['ratio']:.2f} times its arithmetic, the quickstart; seconds: {parts}")
        if options.profile:
            x, y = torch.randn(options.samples, options.features), torch.arange(options.samples) % CLASSES
            print(profiled(lambda: by_the_trainer(x, y, options.units, options.batch_size)))
    finally:
        torch.set_num_threads(threads)
    return report(options, described, **results)


if __name__ == "__main__":
    main()
