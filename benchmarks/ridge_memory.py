"""Ridge memory units: samples a second they learn, the time of a prediction, and two ways to keep a solution current.

    python -m benchmarks.ridge_memory
    python -m benchmarks.ridge_memory --features 1280 --units 10 --delta 2 --batch_size 128 --threads 2 --device cuda

Learning is the sums and keys of a stream whose features form clouds, without the solution, which is timed by itself
with ridges by cross-validation and with one that is given. Predictions are those of a batch in evaluation, in turn with
those of `MHLinear` with as many units and the same distance. Last, one Gram matrix: a Cholesky solution in float64 when
it is asked for, and the inverse updated by Woodbury's identity after each batch, in float32 and float64, with the
relative error of its weights at the end.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.training_step import machine
from mh_lightning import MHLinear
from mh_lightning.heads import RidgeMemoryUnits

RIDGE = 1.0
REPEATS = 300


def clouds(samples: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features around three centres a class, in the order of the classes; half of them 0, as those of backbones are."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(classes).repeat_interleave(-(-samples // classes))[:samples]
    centres = torch.randn(classes, 3, features, generator=generator)
    which = torch.randint(3, (samples,), generator=generator)
    noise = 0.3 * torch.randn(samples, features, generator=generator)
    return (centres[targets, which] + noise).relu(), targets


def seconds(work: Callable[[], object]) -> float:
    """Of one call, and of what it has set a GPU to do."""
    wait_for_gpu()
    started = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - started


def wait_for_gpu() -> None:
    """Until it has nothing to do, if it was used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_in_turn(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of calls that take turns, after one of each."""
    for work in works.values():
        work()
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in works}


def updated_inverse(batches: list[tuple[Tensor, Tensor]], features: int, dtype: torch.dtype) -> Tensor:
    """Weights after rank-b updates of the inverse of a Gram matrix with its ridge."""
    device = batches[0][0].device
    inverse = torch.eye(features, dtype=dtype, device=device) / RIDGE
    products = torch.zeros(features, batches[0][1].shape[1], dtype=dtype, device=device)
    for x, y in batches:
        x = x.to(dtype)
        carried = inverse @ x.T
        inner = torch.eye(len(x), dtype=dtype, device=device) + x @ carried
        inverse -= carried @ torch.linalg.solve(inner, carried.T)
        products += x.T @ y.to(dtype)
    return inverse @ products


def summed(batches: list[tuple[Tensor, Tensor]], features: int) -> tuple[Tensor, Tensor]:
    """Gram matrix in float32 and products in float64, as the layer keeps them."""
    device = batches[0][0].device
    gram = torch.zeros(features, features, dtype=torch.float32, device=device)
    products = torch.zeros(features, batches[0][1].shape[1], dtype=torch.float64, device=device)
    for x, y in batches:
        gram.addmm_(x.T, x)
        products += x.T.double() @ y.double()
    return gram, products


def solved(gram: Tensor, products: Tensor) -> Tensor:
    """Weights by Cholesky, in float64."""
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.cholesky_solve(products, torch.linalg.cholesky(gram.double() + ridge))


def relative_error(weights: Tensor, reference: Tensor) -> float:
    """Frobenius."""
    return float((weights.double() - reference).norm() / reference.norm())


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """All figures, by name."""
    x, targets = (part.to(options.device) for part in clouds(options.samples, options.features, options.classes))
    batches = list(zip(x.split(options.batch_size), targets.split(options.batch_size), strict=True))
    heads = [
        RidgeMemoryUnits(options.features, options.classes, options.units, options.delta, ridge=ridge).to(
            options.device
        )
        for ridge in ("auto", RIDGE)
    ]

    def learn(head: RidgeMemoryUnits) -> None:
        for part, classes in batches:
            head.update(part, classes)
        head.settle()

    found = {"samples/s learnt": options.samples / min(seconds(lambda head=head: learn(head)) for head in heads)}
    for name, head in zip(("auto", "given"), heads, strict=True):
        found[f"s to solve, ridge {name}"] = seconds(head.ensure_solved)
    part = x[: options.batch_size]
    predicting: dict[str, torch.nn.Module] = {"": heads[0]}
    for name, normalize in ((", MHLinear", False), (", MHLinear with normalize_input", True)):
        predicting[name] = MHLinear(options.features, options.classes, key_mem_units=options.units,
                                    delta=options.delta, distance="euclidean", normalize_input=normalize)  # fmt: skip
    times = seconds_in_turn(
        {name: partial(head.to(options.device).eval(), part) for name, head in predicting.items()}, REPEATS
    )
    found |= {f"ms to predict a batch{name}": 1000 * time for name, time in times.items()}

    z = [torch.nn.functional.normalize(part, dim=1) for part, _ in batches]
    one_hot = [torch.nn.functional.one_hot(classes, options.classes) for _, classes in batches]
    pairs = list(zip(z, one_hot, strict=True))
    exact = torch.cat(z).double()
    reference = solved(exact.T @ exact, exact.T @ torch.cat(one_hot).double())
    found["s of sums alone"] = seconds(lambda: summed(pairs, options.features))
    sums = summed(pairs, options.features)
    found["s of one Cholesky solution"] = seconds(lambda: solved(*sums))
    found["error, sums and Cholesky"] = relative_error(solved(*sums), reference)
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        update = partial(updated_inverse, pairs, options.features, dtype)
        found[f"s of rank-b updates, {name}"] = seconds(update)
        found[f"error, rank-b updates, {name}"] = relative_error(update(), reference)
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 16_000), ("features", 1280), ("classes", 10), ("units", 10), ("delta", 2),
                          ("batch_size", 128), ("threads", 2)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = measure(options)
    finally:
        torch.set_num_threads(threads)
    print(", ".join(f"{name} {value}" for name, value in machine(options.device).items()))
    print(f"{options}\n| measured | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} |" if value >= 100 else f"| {name} | {value:.2g} |")
    return found


if __name__ == "__main__":
    main()
