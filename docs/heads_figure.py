"""Draw docs/heads.png: accuracy against bytes of the heads in closed form, from the tables of docs/heads.

python docs/heads_figure.py docs/heads docs/heads.png
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

STREAMS = {
    "pacs_di": "PACS, by domains",
    "pacs_cdi": "PACS, classes in domains",
    "mini_imagenet_20x5": "mini-ImageNet, 20 × 5",
    "fashion_mnist": "Fashion-MNIST",
    "digits": "digits",
}
CURVES = {  # of experiments whose names begin so; colours of Okabe and Ito, which the colour-blind can tell apart
    "kernel_memory_head": ("kernel memory units", "#0072B2", "o"),
    "ranpac": ("RanPAC", "#D55E00", "s"),
    "fourier": ("Fourier features, ridge", "#E69F00", "^"),
    "klda": ("KLDA", "#009E73", "v"),
    "loranpac": ("LoRanPAC", "#CC79A7", "D"),
}
POINTS = {
    "one_ridge": ("one ridge regression", "#000000", "x"),
    "discriminant_rank_64": ("Gaussian classes, rank 64", "#000000", "+"),
    "slda": ("streaming LDA", "#777777", "1"),
}
BELOW = 0.09  # of the best: what is worse is not drawn

Found = dict[str, dict[str, tuple[float, float]]]  # MB and per cent, of each experiment of each stream


def read(folder: Path) -> Found:
    """Means over the runs of each table in a folder."""
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for file in sorted(folder.glob("*/runs.csv")):
        for row in csv.DictReader(file.read_text().splitlines()):
            runs[row["experiment"]].append((float(row["state_bytes"]) / 1e6, 100 * float(row["average_accuracy"])))
    found: Found = {stream: {} for stream in STREAMS}
    for name, values in runs.items():
        for stream in STREAMS:
            if name.startswith(f"{stream}_") and not name.startswith((f"{stream}_full", f"{stream}_perturbed")):
                size, accuracy = zip(*values, strict=True)
                found[stream][name.removeprefix(f"{stream}_")] = fmean(size), fmean(accuracy)
    return found


def draw(axes: Axes, title: str, found: dict[str, tuple[float, float]]) -> None:
    """One stream."""
    for name, (label, colour, marker) in CURVES.items():
        points = sorted(point for experiment, point in found.items() if experiment.startswith(f"{name}_"))
        width = 2.2 if name == "kernel_memory_head" else 1.1
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=width, markersize=5)
    for name, (label, colour, marker) in POINTS.items():
        axes.plot(*found[name], marker, color=colour, label=label, markersize=8, markeredgewidth=1.8)
    best = max(accuracy for _, accuracy in found.values())
    axes.set_ylim(best * (1 - BELOW), best * 1.008)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main(folder: Path, target: Path) -> None:
    """Draw a panel a stream, and the legend where a sixth would be."""
    found = read(folder)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, 3)
    panels = list(grid.flat)
    for axes, (stream, title) in zip(panels, STREAMS.items(), strict=False):
        draw(axes, title, found[stream])
    for axes in grid[:, 0]:
        axes.set_ylabel("average accuracy, test (%)")
    for axes in (*grid[1, :2], grid[0, 2]):
        axes.set_xlabel("state (MB)")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", fontsize=10, frameon=False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
