"""Draw how the time of a training step grows, from the JSON of `python -m benchmarks.training_step --growth`.

python docs/training_step_figure.py growth.json docs/training_step.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LINES = {
    "linear": ("nn.Linear(n, o·m), SGD", "tab:gray", "o--"),
    "head": ("MHLinear, SGD", "tab:blue", "s-"),
    "head_touched": ("MHLinear, memory_head_optimizer", "tab:orange", "^-"),
}
AXES = {"m": "memory units m", "o": "outputs o", "b": "batch size b"}


def main(source: Path, target: Path) -> None:
    """One panel for each size that grows."""
    results: list[dict[str, Any]] = json.loads(source.read_text())["results"]
    assert len(results) == 15, "a file that --growth wrote has 15 sizes"
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (name, label), start in zip(panels, AXES.items(), (0, 5, 10), strict=True):
        grown = results[start : start + 5]
        for line, (title, colour, style) in LINES.items():
            axes.plot([r[name] for r in grown], [1000 * r["seconds"][line] for r in grown], style, color=colour,
                      label=title)  # fmt: skip
        fixed = ", ".join(f"{other} {grown[0][other]}" for other in ("b", "n", "o", "m", "delta") if other != name)
        axes.set(xscale="log", yscale="log", xlabel=f"{label}   ({fixed})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training step, ms")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
