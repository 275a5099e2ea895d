"""Draw what the runner found of the Ridge Memory Head and its rivals: by stream, and against the bytes they keep; and
what the ablations found of cheaper variants.

python docs/ridge_memory_head_figure.py docs/ridge_memory_head docs/ridge_memory_head.png
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

METHODS = {
    "ridge_memory_head": ("Ridge Memory Head", "tab:red", "o"),
    "ridge_memory_head_projections": ("the same and 5,000 projections", "tab:pink", "p"),
    "ranpac": ("RanPAC, 5,000", "tab:blue", "s"),
    "ranpac_2875": ("RanPAC, 2,875", "tab:blue", "x"),
    "fecam": ("FeCAM", "tab:cyan", "D"),
    "slda": ("streaming LDA", "tab:green", "^"),
    "ncm": ("nearest class mean", "tab:olive", "v"),
    "er": ("experience replay", "tab:purple", "P"),
    "joint": ("joint training", "black", "_"),
    "memory_head": ("Memory Head, gradient", "tab:orange", "X"),
}
SAME = {"er_reservoir": "er", "memory_head_searched": "memory_head"}
STREAMS = {
    "fashion_mnist": "Fashion-\nMNIST",
    "fashion_mnist_full": "the same,\n60,000",
    "fashion_mnist_perturbed_cdi": "the same,\nperturbed",
    "digits": "digits",
    "digits_perturbed_cdi": "digits,\nperturbed",
    **{f"{name}_{order}": f"{name.upper()}\n{order.upper()}" for name in ("modes", "moons")
       for order in ("iid", "ci", "cdi", "cdid")},
}  # fmt: skip


# of the ablations: label, colour, and how names of variants end
SERIES = (
    ("1, 2, 3, 5, 10, 20 units", "tab:red", " units"),
    ("10 units, 3,000 and 5,000 projections beside", "tab:pink", " beside"),
    ("10 units of some directions", "tab:olive", " directions"),
    ("10 units of some principal directions", "tab:green", " principal directions"),
    ("10 units on projections", "tab:orange", " projections"),
    ("10 units, one Gram matrix", "tab:brown", "one Gram matrix"),
    ("RanPAC", "tab:blue", "RanPAC, 1000 projections"),
    ("streaming LDA", "black", "streaming LDA"),
)
LOW = "rank {} and a diagonal: {:.0f}%"  # far below all else


def draw_variants(axes: Axes, path: Path) -> None:
    """Validation accuracy against bytes."""
    measured = defaultdict(list)
    for row in csv.DictReader(path.open()):
        measured[row["variant"], int(row["bytes"])].append(100 * float(row["accuracy"]))
    left = dict(measured)
    for label, colour, ending in reversed(SERIES):
        chosen = sorted((size, fmean(left.pop(key))) for key in [*left] if key[0].endswith(ending) for size in [key[1]])
        axes.plot([size / 1e6 for size, _ in chosen], [mean for _, mean in chosen], "o-", color=colour, label=label)
    low = [LOW.format(name.split()[1], fmean(found)) for (name, _), found in left.items() if name.endswith("diagonal")]
    axes.text(0.03, 0.97, "10 units of\n" + "\n".join(low), transform=axes.transAxes, fontsize=8, va="top")
    axes.set(xscale="log", xlabel="state, MB", ylabel="Fashion-MNIST, validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main(folder: Path, target: Path) -> None:
    """Three panels."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for path in sorted(folder.glob("*/experiments.csv")):
        for row in csv.DictReader(path.open()):
            stream = max((name for name in STREAMS if row["experiment"].startswith(f"{name}_")), key=len, default="")
            method = row["experiment"].removeprefix(f"{stream}_")
            if stream and (method := SAME.get(method, method)) in METHODS:
                rows.setdefault((stream, method), row)
    figure = Figure(figsize=(14, 9), layout="constrained")
    panels = figure.subplot_mosaic([["streams", "streams"], ["rivals", "variants"]])
    left, right = panels["streams"], panels["rivals"]
    draw_variants(panels["variants"], folder / "ablations.csv")
    for place, (method, (label, colour, marker)) in enumerate(METHODS.items()):
        points = [(index, rows[stream, method]) for index, stream in enumerate(STREAMS) if (stream, method) in rows]
        left.errorbar(
            [index + 0.08 * (place - len(METHODS) / 2) for index, _ in points],
            [100 * float(row["average_accuracy"]) for _, row in points],
            [100 * float(row["average_accuracy_half_width"] or 0) for _, row in points],  # one value has none
            fmt=marker, color=colour, label=label, markersize=9 if marker == "_" else 6, capsize=2,
        )  # fmt: skip
        if method != "joint" and ("fashion_mnist", method) in rows:  # its samples are no part of its state
            row = rows["fashion_mnist", method]
            x, y = float(row["state_bytes"]) / 1e6, 100 * float(row["average_accuracy"])
            right.plot(x, y, marker, color=colour, markersize=9, zorder=3 if marker == "x" else 2)
    left.set_xticks(range(len(STREAMS)), list(STREAMS.values()), fontsize=9)
    left.set(ylabel="average accuracy, test, %", ylim=(30, 102))
    for edge in range(1, len(STREAMS)):
        left.axvline(edge - 0.5, color="0.9", linewidth=1)
    left.grid(axis="y", alpha=0.3)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=(len(METHODS) + 1) // 2, frameon=False
    )
    right.set(xscale="log", xlabel="state, MB", ylabel="Fashion-MNIST, average accuracy, test, %", xlim=(0.02, 1000),
              ylim=(72, 91))  # fmt: skip
    right.grid(alpha=0.3)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
