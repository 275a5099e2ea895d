"""How well the cost rule chooses between products of all units and products unit by unit.

    python -m benchmarks.cost_rule
    python -m benchmarks.cost_rule --sizes 64,768,30,30,2,cosine --seconds 5

Runs forward and gradient of `blend` both ways in turn, and prints median times. A star marks the rule's choice, and
the loss is what that choice costs, relative to the better one.
"""

import itertools
import statistics
import time

import torch
from torch import Tensor, nn

from benchmarks.report import machine, parser, report
from benchmarks.training_step import TABLE, Size, turns
from mh_lightning import functional
from mh_lightning.functional import grouped

WAYS = {"all units": 10**18, "by unit": -(10**18)}
SIZES = [
    *TABLE,
    *(Size(b, 768, o, m, 2, "cosine") for b, o, m in itertools.product((1, 16, 64, 256), (10, 100), (5, 20, 80))),
]


def median_times(size: Size, seconds: float) -> dict[tuple[str, str], float]:
    """Median seconds of the forward and of the memories' gradient, computed either way."""
    torch.manual_seed(0)
    b, n, o, m, delta, _ = size
    units = torch.rand(b, 1, m).topk(delta, dim=2).indices
    attention = functional.Attention(torch.empty(0), units, torch.full((b, 1, delta), 1 / delta))
    memories, gradient = nn.Parameter(torch.randn(1, m, o * (n + 1))), torch.randn(b, o)
    inputs, weights = torch.randn(4, b, n), nn.Linear(n, o * m)
    samples: dict[tuple[str, str], list[float]] = {}

    def step(x: Tensor) -> tuple[float, float, float]:
        begun = time.perf_counter()
        outputs = functional.blend(x, memories, attention, bias=True, winner_only=True)
        between = time.perf_counter()
        torch.autograd.grad(outputs, memories, gradient)
        return begun, between, time.perf_counter()

    for turn in turns(seconds):
        for way, overhead in WAYS.items():
            weights(inputs[turn % 4])  # something else has the caches before
            grouped.GROUPING["cpu"] = overhead
            begun, between, ended = step(inputs[turn % 4])
            samples.setdefault((way, "forward"), []).append(between - begun)
            samples.setdefault((way, "backward"), []).append(ended - between)
    return {key: statistics.median(values[2:]) for key, values in samples.items()}


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Measure, print, and return what the rule's choice costs beside the better one, a size at a time."""
    given = parser(__doc__)
    given.add_argument("--sizes", nargs="+", type=Size.parse, default=SIZES, metavar="b,n,o,m,delta,distance")
    given.add_argument("--seconds", type=float, default=2.0, help="for each size")
    given.add_argument("--threads", type=int, default=2)
    options = given.parse_args(arguments)
    threads, overhead = torch.get_num_threads(), grouped.GROUPING["cpu"]
    torch.set_num_threads(options.threads)
    described, results = machine(), []
    print(
        "|  b, n, o, m, delta       | rule loses | forward ms: all units | by unit | backward ms: all units | by unit |"
    )
    print("|---|---|---|---|---|---|")
    try:
        for size in options.sizes:
            median = median_times(size, options.seconds)
            grouped.GROUPING["cpu"] = overhead
            result, cells = {}, []
            for part, pairs in (("forward", size.b * size.delta), ("backward", size.b)):
                times = {way: median[way, part] for way in WAYS}
                by_unit = grouped.grouping_pays(size.b, pairs, size.m, size.o * (size.n + 1), "cpu")
                chosen = "by unit" if by_unit else "all units"
                result[part] = times[chosen] / min(times.values())
                cells += [f"{1000 * time:.3f}{'*' if way == chosen else ' '}" for way, time in times.items()]
            results.append(result)
            name = ", ".join(map(str, size[:5]))
            print(f"| {name:24} | {result['forward']:.2f}, {result['backward']:.2f} | {cells[0]:>21} | {cells[1]:>8} "
                  f"| {cells[2]:>22} | {cells[3]:>8} |", flush=True)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
        grouped.GROUPING["cpu"] = overhead
    sizes = [size._asdict() for size in options.sizes]
    report(options, described, rule_loses=[size | result for size, result in zip(sizes, results, strict=True)])
    return results


if __name__ == "__main__":
    main()
