"""What memory units are worth against one ridge regression, class order by class order, on validation samples.

    python -m benchmarks.units_against_one --features data/pacs.pt --in_a_task 1 --orders 5

The file holds the training samples of a `mh_lightning.data.TensorFile`: x_train, y_train and, if it has them,
domain_train; test samples are not read. A fifth is held out, drawn anew for each class order; domains come one after
the other, and in each the classes in the order that was drawn.
"""

import argparse
import time

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from mh_lightning.heads import RidgeMemoryUnits

HELD_OUT = 0.2


def stream(entries: dict[str, Tensor], order: int, in_a_task: int) -> tuple[Tensor, Tensor]:
    """Indices of training samples in the order of a stream, and of validation samples."""
    y = entries["y_train"].long()
    domains = entries.get("domain_train", torch.zeros_like(y))
    generator = torch.Generator().manual_seed(order)
    places = torch.randperm(len(y), generator=generator)
    parts = train_test_split(places, test_size=HELD_OUT, random_state=order, stratify=y[places])
    train, validation = (torch.as_tensor(part) for part in parts)
    classes = int(y.max()) + 1
    task_of_class = torch.randperm(classes, generator=generator) // in_a_task
    tasks = domains[train] * classes + task_of_class[y[train]]
    return train[tasks.argsort(stable=True)], validation


@torch.no_grad()
def measure(entries: dict[str, Tensor], order: int, in_a_task: int, units: int, normalization: str) -> dict[str, float]:
    """Validation accuracy, the ridge of the units (infinite where one regression answers), and seconds."""
    x, y = entries["x_train"], entries["y_train"].long()
    train, validation = stream(entries, order, in_a_task)
    head = RidgeMemoryUnits(x.shape[1], int(y.max()) + 1, units, normalization=normalization)
    start = time.perf_counter()
    head.update(x[train], y[train])
    answers = head(x[validation]).argmax(dim=1)
    seconds = time.perf_counter() - start
    accuracy = float((answers == y[validation]).double().mean())
    return {"accuracy": accuracy, "ridge": float(head.ridge[1]), "seconds": seconds}


def main(arguments: list[str] | None = None) -> list[float]:
    """Measure, print, and return the differences in accuracy, one for each class order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, help="file of tensors")
    parser.add_argument("--in_a_task", type=int, default=1, help="classes in a task")
    parser.add_argument("--orders", type=int, default=5, help="class orders")
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--normalization", default="sqrt")
    options = parser.parse_args(arguments)
    entries = torch.load(options.features, weights_only=True)
    print(f"| class order | one regression, % | {options.units} units | difference | ridge of the units | seconds |")
    print("|---|---|---|---|---|---|")
    differences = []
    for order in range(options.orders):
        one, many = (
            measure(entries, order, options.in_a_task, units, options.normalization) for units in (1, options.units)
        )
        differences.append(many["accuracy"] - one["accuracy"])
        gain = f"{100 * differences[-1]:+.2f}"
        cells = [f"{order}", *(f"{100 * found['accuracy']:.2f}" for found in (one, many)), gain]
        print(f"| {' | '.join(cells)} | {many['ridge']:.3g} | {many['seconds']:.1f} |", flush=True)
    return differences


if __name__ == "__main__":
    main()
