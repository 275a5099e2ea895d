"""What a Memory Head costs, beside the linear layer that multiplies with every memory unit.

    python -m benchmarks.training_step                             # the sizes of docs/performance.md
    python -m benchmarks.training_step --growth                    # m, o and b, five sizes each
    python -m benchmarks.training_step --sizes 32,512,10,50,2,euclidean 64,512,10,50,2,cosine
    python -m benchmarks.training_step --device cuda --growth --profile

A step is: zero_grad, forward, cross-entropy, backward, the layer's own updates, SGD step. All that is compared runs in
turn, one step each, in one process; the table gives medians, and of the steps also half the range between quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks.report import machine, parser, report
from mh_lightning import MHLinear, memory_head_optimizer

BATCHES = 8  # different ones, so that winners change


class Size(NamedTuple):
    b: int
    n: int
    o: int
    m: int
    delta: int
    distance: str

    @staticmethod
    def parse(text: str) -> "Size":
        try:
            *numbers, distance = text.split(",")
            return Size(*map(int, numbers), distance)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not b,n,o,m,delta,distance; try 128,768,10,10,2,cosine"
            ) from error


TABLE = [
    Size(1, 512, 100, 100, 2, "cosine"),
    Size(8, 768, 10, 10, 1, "cosine"),
    Size(128, 768, 10, 10, 2, "cosine"),
    Size(128, 768, 100, 10, 2, "euclidean"),
    Size(256, 1280, 10, 100, 2, "cosine"),
    Size(64, 768, 100, 100, 2, "cosine"),
    Size(128, 768, 1000, 10, 2, "cosine"),
]
MIDDLE = Size(64, 768, 30, 30, 2, "cosine")
GROWTH = [
    *(MIDDLE._replace(m=m) for m in (10, 30, 100, 300, 1000)),
    *(MIDDLE._replace(o=o) for o in (10, 30, 100, 300, 1000)),
    *(MIDDLE._replace(b=b) for b in (1, 8, 64, 512, 4096)),
]


class Contender(NamedTuple):
    """A layer in training, or in evaluation where it has no optimizer."""

    layer: nn.Module
    optimizer: torch.optim.Optimizer | None = None

    def run(self, x: Tensor, targets: Tensor) -> None:
        if self.optimizer is None:
            with torch.no_grad():
                self.layer(x)
            return
        self.optimizer.zero_grad()
        F.cross_entropy(self.layer(x), targets).backward()
        self.optimizer.step()


class Matching(nn.Module):
    """The part of a Memory Head that finds and weighs units."""

    def __init__(self, head: MHLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head._attend(x)


def contenders(size: Size, device: str) -> dict[str, Contender]:
    _, n, o, m, delta, distance = size

    def head() -> MHLinear:
        return MHLinear.published(n, o, key_mem_units=m, delta=delta, distance=distance, upd_m="WTA",
                upd_k="ad_hoc_WTA",
                        scramble=True, device=device)  # fmt: skip

    linear, plain, touched, evaluated = nn.Linear(n, o * m, device=device), head(), head(), head().eval()
    return {
        "linear": Contender(linear, SGD(linear.parameters(), lr=0.01)),
        "head": Contender(plain, SGD(plain.parameters(), lr=0.01)),
        "head_touched": Contender(touched, memory_head_optimizer(touched, SGD, lr=0.01)),
        "eval_linear": Contender(nn.Linear(n, o * m, device=device)),
        "eval_one_unit": Contender(nn.Linear(n, o, device=device)),
        "eval_matching": Contender(Matching(evaluated)),
        "eval_head": Contender(evaluated),
    }


def timed(work: Callable[[], None], device: str) -> float:
    """Seconds, by CUDA events on a GPU."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(size: Size, device: str, seconds: float) -> dict[str, Any]:
    """Median seconds of every contender, the spread of the steps, and the ratios that are claimed."""
    torch.manual_seed(0)
    running = contenders(size, device)
    inputs = torch.randn(BATCHES, size.b, size.n, device=device)
    classes = {name: size.o * size.m if name == "linear" else size.o for name in running}
    targets = {name: torch.randint(count, (size.b,), device=device) for name, count in classes.items()}
    samples: dict[str, list[float]] = {name: [] for name in running}
    for turn in turns(seconds):
        x = inputs[turn % BATCHES]
        for name, contender in running.items():
            taken = timed(partial(contender.run, x, targets[name]), device)
            if turn >= 3:  # after the warm-up
                samples[name].append(taken)
    median = {name: statistics.median(values) for name, values in samples.items()}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    selected = size.delta * median["eval_one_unit"] + median["eval_matching"]
    return {
        **size._asdict(),
        "seconds": median,
        "spread": {name: (high - low) / 2 for name, (low, _, high) in quartiles.items()},
        "repeats": len(samples["linear"]),
        "train_ratio": median["head"] / median["linear"],
        "train_ratio_touched": median["head_touched"] / median["linear"],
        "eval_ratio": median["eval_head"] / min(median["eval_linear"], selected),
        "eval_ratio_to_linear": median["eval_head"] / median["eval_linear"],
    }


def turns(seconds: float) -> Iterator[int]:
    """Count for about this long, and at least to 8."""
    end, turn = time.monotonic() + seconds, 0
    while turn < 8 or time.monotonic() < end:
        yield turn
        turn += 1


HEADER = (
    "|  b, n, o, m, delta, distance          | nn.Linear(n, o·m) ms | MHLinear ms, SGD | ratio | MHLinear ms, touched "
    "units | ratio | eval ms: nn.Linear | MHLinear | to the better |"
)


def row(result: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        return f"{1000 * result['seconds'][name]:.2f} ± {1000 * result['spread'][name]:.2f}"

    size = ", ".join(str(result[name]) for name in Size._fields)
    return (
        f"| {size:37} | {cell('linear'):>20} | {cell('head'):>16} | {result['train_ratio']:5.2f} | "
        f"{cell('head_touched'):>26} | {result['train_ratio_touched']:5.2f} | "
        f"{1000 * result['seconds']['eval_linear']:18.3f} | {1000 * result['seconds']['eval_head']:8.3f} | "
        f"{result['eval_ratio']:13.2f} |"
    )


def profile(size: Size, device: str) -> str:
    """Where the time of a training step goes."""
    contender = contenders(size, device)["head_touched"]
    x, targets = torch.randn(size.b, size.n, device=device), torch.randint(size.o, (size.b,), device=device)
    for _ in range(3):
        contender.run(x, targets)
    with torch.profiler.profile() as record:
        for _ in range(10):
            contender.run(x, targets)
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(record.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and return the results."""
    given = parser(__doc__, ("cpu", "cuda"))
    given.add_argument("--sizes", nargs="+", type=Size.parse, default=TABLE, metavar="b,n,o,m,delta,distance")
    given.add_argument("--growth", action="store_true", help="sizes that grow in m, o and b, in place of --sizes")
    given.add_argument("--seconds", type=float, default=10.0, help="for each size")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--profile", action="store_true", help="print where the time goes, too")
    options = given.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    described, results = machine(options.device), []
    print(HEADER)
    print("|---" * HEADER[1:].count("|") + "|")
    try:
        for size in GROWTH if options.growth else options.sizes:
            results.append(measure(size, options.device, options.seconds))
            print(row(results[-1]), flush=True)
            if options.profile:
                print(profile(size, options.device), flush=True)
    finally:
        torch.set_num_threads(threads)
    report(options, described, results=results)
    return results


if __name__ == "__main__":
    main()
