"""What closed-form heads cost: samples a second that they learn, seconds to solve and to predict, bytes.

    python -m benchmarks.closed_form                                  # one size, beside a discriminant as often written
    python -m benchmarks.closed_form --growth --json growth.json      # 10 to 10,000 classes, 384 to 4,096 features
    python -m benchmarks.closed_form --samples 20000 --features 1280 --classes 10 --threads 2 --device cuda

Features are random; classes come at random, which is the most work for heads that keep something for each class. Beside
them, linear discriminants as they are often implemented: a running covariance moved by one sample after the other, and
its pseudo-inverse for each batch; on a few batches, since it takes long. Heads whose state would be larger than
`--most_gigabytes` are left out, and said so.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, parser, report
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    KernelMemoryUnits,
    RandomFeatureDiscriminant,
    RandomFeatureRidge,
    RandomProjectionRidge,
    RegularisedDiscriminant,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
    TruncatedProjection,
)

Batches = Iterable[tuple[Tensor, Tensor]]
NAIVE_BATCHES = 2
PREDICTED = 128
FEATURES_OF_GROWTH, CLASSES_OF_GROWTH = (384, 768, 1536, 4096), (10, 100, 1000, 10_000)
FIXED = (768, 100)  # features while classes grow, and classes while features do


class NaiveDiscriminant:
    """Ready to predict after each batch, at the price of a pseudo-inverse."""

    def __init__(self, features: int, classes: int) -> None:
        self.means, self.counts = torch.zeros(classes, features), torch.zeros(classes)
        self.covariance, self.samples = torch.zeros(features, features), 0

    def update(self, features: Tensor, targets: Tensor) -> None:
        for x, target in zip(features, targets.tolist(), strict=True):
            shift = x - self.means[target]
            moved = self.samples / (self.samples + 1) * torch.outer(shift, shift)
            self.covariance += (moved - self.covariance) / (self.samples + 1)
            self.counts[target] += 1
            self.means[target] += shift / self.counts[target]
            self.samples += 1
        shrunk = (1 - 1e-4) * self.covariance + 1e-4 * torch.eye(len(self.covariance))
        self.weights = self.means @ torch.linalg.pinv(shrunk)


def kinds(features: int, classes: int, options: argparse.Namespace) -> dict[str, Callable[[], ClosedFormHead]]:
    """What makes each head."""
    sizes = features, classes
    return {
        "ClassMeans": lambda: ClassMeans(*sizes),
        "StreamingLinearDiscriminant": lambda: StreamingLinearDiscriminant(*sizes),
        "ShrunkClassCovariances": lambda: ShrunkClassCovariances(*sizes),
        "KernelMemoryUnits": lambda: KernelMemoryUnits(*sizes, options.units, options.max_bytes),
        "RandomFeatureRidge": lambda: RandomFeatureRidge(*sizes, options.projections),
        "RandomFeatureDiscriminant": lambda: RandomFeatureDiscriminant(*sizes, options.projections),
        "RandomProjectionRidge": lambda: RandomProjectionRidge(*sizes, options.projections),
        "RegularisedDiscriminant": lambda: RegularisedDiscriminant(*sizes),
        "TruncatedProjection": lambda: TruncatedProjection(*sizes, 2 * options.projections),
    }


def bytes_of(make: Callable[[], ClosedFormHead]) -> int:
    """Of a head's state, without making it."""
    with torch.device("meta"):
        return sum(buffer.nbytes for buffer in make().buffers())


def cost(make: Callable[[], ClosedFormHead], batches: Batches, device: str) -> dict[str, float]:
    """Seconds to learn all batches, to solve, and to predict `PREDICTED` samples; bytes of state."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    head = make().to(device)
    started = now()
    for x, targets in batches:
        head.update(x, targets)
    head.settle()
    learnt = now()
    queries = torch.randn(PREDICTED, head.num_features, device=device)
    head(queries[:1])
    solved = now()
    head(queries)
    predicted = now()
    state = sum(buffer.nbytes for buffer in head.buffers())
    return {"learn": learnt - started, "solve": solved - learnt, "predict": predicted - solved, "bytes": state}


def measure(features: int, classes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cost of each head, printed as it is found."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.samples, features, generator=generator).to(options.device)
    targets = torch.randint(classes, (options.samples,), generator=generator).to(options.device)
    batches = list(zip(x.split(options.batch_size), targets.split(options.batch_size), strict=True))
    print(f"\n{features} features, {classes:,} classes\n")
    print(
        f"| head                        | samples/s | with the solution | s to solve | ms to predict {PREDICTED} | MB |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    for name, make in kinds(features, classes, options).items():
        if options.heads and name not in options.heads:
            continue
        if (size := bytes_of(make)) > options.most_gigabytes * 1e9:
            print(f"| {name:27} | left out, its state would take {size / 1e9:.0f} GB |||||", flush=True)
            continue
        runs = [cost(make, batches, options.device) for _ in range(options.repeats)]
        best = {part: min(run[part] for run in runs) for part in runs[0]}
        rate = options.samples / best["learn"]
        whole = options.samples / (best["learn"] + best["solve"])
        rows.append({"head": name, "features": features, "classes": classes, "samples_per_second": rate,
                     "with_solution": whole, **best})  # fmt: skip
        print(f"| {name:27} | {rate:9,.0f} | {whole:17,.0f} | {best['solve']:10.3f} | {1000 * best['predict']:16.2f} | "
              f"{best['bytes'] / 1e6:.1f} |", flush=True)  # fmt: skip
    return rows


def naive_rate(features: int, classes: int, options: argparse.Namespace) -> float:
    """Samples a second of `NaiveDiscriminant`."""
    naive, started = NaiveDiscriminant(features, classes), time.perf_counter()
    for _ in range(NAIVE_BATCHES):
        x = torch.randn(options.batch_size, features)
        naive.update(x, torch.arange(options.batch_size) % classes)
    rate = naive.samples / (time.perf_counter() - started)
    print(f"| discriminant, each batch    |           | {rate:17,.0f} |            |                  | |", flush=True)
    return rate


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and return the rows."""
    given = parser(__doc__, ("cpu", "cuda"))
    given.add_argument("--growth", action="store_true", help="sizes that grow, in place of --features and --classes")
    given.add_argument("--heads", nargs="+", help="only these")
    given.add_argument("--samples", type=int, default=10_000)
    given.add_argument("--features", type=int, nargs="+", default=[768], help="with --growth, in place of 384 to 4096")
    given.add_argument("--classes", type=int, nargs="+", default=[100], help="with --growth, in place of 10 to 10,000")
    given.add_argument("--batch_size", type=int, default=128)
    given.add_argument("--projections", type=int, default=5000)
    given.add_argument("--units", type=int, default=1000)
    given.add_argument("--max_bytes", type=int, default=10_000_000, help="of memory units")
    given.add_argument("--most_gigabytes", type=float, default=4.0)
    given.add_argument("--threads", type=int, default=1)
    given.add_argument("--repeats", type=int, default=3, help="the best counts")
    options = given.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    described = machine(options.device)
    try:
        if options.growth:
            chosen = options.features != [768] or options.classes != [100]
            features = options.features if chosen else FEATURES_OF_GROWTH
            classes = options.classes if chosen else CLASSES_OF_GROWTH
            sizes = [(FIXED[0], count) for count in classes] + [(count, FIXED[1]) for count in features]
        else:
            sizes = [(options.features[0], options.classes[0])]
        rows = [row for size in dict.fromkeys(sizes) for row in measure(*size, options)]
        if not options.growth and not options.heads:
            rows.append({"head": "naive", "with_solution": naive_rate(*sizes[0], options)})
    finally:
        torch.set_num_threads(threads)
    report(options, described, rows=rows)
    return rows


if __name__ == "__main__":
    main()
