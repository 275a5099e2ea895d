"""Draw what closed-form heads cost, from the JSON of `python -m benchmarks.closed_form --growth`.

python docs/closed_form_cost_figure.py growth.json docs/closed_form_cost.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = {
    "samples_per_second": "samples learnt a second",
    "solve": "seconds to solve",
    "predict": "ms to predict 128 samples",
    "bytes": "MB of state",
}
SCALE = {"predict": 1e3, "bytes": 1e-6}
ROWS = {"classes": "classes", "features": "features"}
# Okabe and Ito's colours, which colour-blind readers tell apart, and a marker each
STYLES = {
    "KernelMemoryUnits": ("#D55E00", "o-"),
    "RandomProjectionRidge": ("#0072B2", "s-"),
    "RandomFeatureRidge": ("#56B4E9", "^-"),
    "RandomFeatureDiscriminant": ("#009E73", "v-"),
    "TruncatedProjection": ("#CC79A7", "D-"),
    "RegularisedDiscriminant": ("#E69F00", "P-"),
    "ShrunkClassCovariances": ("#000000", "X-"),
    "StreamingLinearDiscriminant": ("#666666", "<--"),
    "ClassMeans": ("#999999", ">:"),
}


def main(source: Path, target: Path) -> None:
    """A row of panels for what grows, a column for each cost."""
    rows: list[dict[str, Any]] = json.loads(source.read_text())["rows"]
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(len(ROWS), len(COLUMNS), squeeze=False)
    for line, (grows, label) in zip(panels, ROWS.items(), strict=True):
        other = "features" if grows == "classes" else "classes"
        fixed = max({row[other] for row in rows}, key=lambda value: len({r[grows] for r in rows if r[other] == value}))
        for axes, (cost, title) in zip(line, COLUMNS.items(), strict=True):
            for head, (colour, style) in STYLES.items():
                points = sorted((row[grows], row[cost] * SCALE.get(cost, 1.0)) for row in rows
                                if row["head"] == head and row[other] == fixed)  # fmt: skip
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=head, markersize=6)
            axes.set(xscale="log", yscale="log", xlabel=f"{label} ({fixed:,} {other})", title=title)
            ticks = sorted({row[grows] for row in rows if row[other] == fixed})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
