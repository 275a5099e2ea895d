"""Samples a second that closed-form heads learn, the solution at the end included.

    python -m benchmarks.closed_form
    python -m benchmarks.closed_form --samples 20000 --features 1280 --classes 10 --threads 2

Features are random; classes come at random, which is the most work for heads that keep something for each class. Beside
them, linear discriminants as they are often implemented: a running covariance moved by one sample after the other, and
its pseudo-inverse for each batch; on a few batches, since it takes long.
"""

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.training_step import machine
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


def seconds_to_learn(head: ClosedFormHead, batches: Batches) -> tuple[float, float, float]:
    """Seconds to learn all batches, to solve, and to predict 1,000 samples."""
    started = time.perf_counter()
    for x, targets in batches:
        head.update(x, targets)
    head.settle()
    learnt = time.perf_counter()
    head(torch.zeros(1, head.num_features))
    solved = time.perf_counter()
    head(torch.randn(1000, head.num_features))
    return learnt - started, solved - learnt, time.perf_counter() - solved


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measure, print, and return samples a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--projections", type=int, default=5000)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--max_bytes", type=int, default=10_000_000, help="of memory units")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    sizes = options.features, options.classes
    kinds: dict[str, Callable[[], ClosedFormHead]] = {
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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.samples, options.features, generator=generator)
    targets = torch.randint(options.classes, (options.samples,), generator=generator)
    batches = list(zip(x.split(options.batch_size), targets.split(options.batch_size), strict=True))
    results: dict[str, float] = {}
    print(", ".join(f"{name} {value}" for name, value in machine("cpu").items()))
    print("| head                        | samples/s | learning alone | seconds to solve | predictions/s |")
    print("|---|---|---|---|---|", flush=True)
    try:
        for name, make in kinds.items():
            runs = [seconds_to_learn(make(), batches) for _ in range(options.repeats)]
            learning, solving, predicting = map(min, zip(*runs, strict=True))
            results[name] = options.samples / (learning + solving)
            print(f"| {name:27} | {results[name]:9,.0f} | {options.samples / learning:14,.0f} | {solving:16.3f} | "
                  f"{1000 / predicting:13,.0f} |", flush=True)  # fmt: skip
        naive, started = NaiveDiscriminant(*sizes), time.perf_counter()
        for batch in batches[:NAIVE_BATCHES]:
            naive.update(*batch)
        results["naive"] = naive.samples / (time.perf_counter() - started)
        print(f"| discriminant, each batch    | {results['naive']:9,.0f} | {'':14} | {'':16} | {'':13} |", flush=True)
    finally:
        torch.set_num_threads(threads)
    return results


if __name__ == "__main__":
    main()
