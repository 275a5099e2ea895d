r"""Draw the README's figure from the run folders of four of the runs in its table.

python docs/quickstart_figure.py \
    runs/{linear,quickstart,digits_normalized_ncm,digits_normalized_kernel_memory_head}/version_0 docs/quickstart.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mh_lightning.callbacks.plots import draw_accuracy_matrix

TITLES = {
    "quickstart": "Memory Head, by gradient",
    "linear": "linear head",
    "digits_normalized_ncm": "nearest class mean",
    "digits_normalized_kernel_memory_head": "Memory Head, closed form",
}


def main(folders: list[Path], target: Path) -> None:
    """Put the accuracy matrices of the runs side by side."""
    figure = Figure(figsize=(3.4 * len(folders), 4.1), layout="constrained")
    for axes, folder in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders, strict=True):
        results = json.loads((folder / "results.json").read_text())
        title = (f"{TITLES[folder.parent.name]}\naccuracy {100 * results['average_accuracy']:.1f} %, "
                 f"forgetting {100 * results['forgetting']:.1f} %")  # fmt: skip
        draw_accuracy_matrix(axes, np.array(results["accuracy_matrix"]), title)
        axes.title.set_fontsize(10)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    *folders, target = map(Path, sys.argv[1:])
    main(folders, target)
