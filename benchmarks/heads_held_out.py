"""Accuracy of closed-form heads, or of settings of one, on held-out training samples: what choices were made by.

    python -m benchmarks.heads_held_out --features data/pacs.pt --heads KernelMemoryUnits RandomFeatureRidge
    python -m benchmarks.heads_held_out --features data/pacs.pt --heads "KernelMemoryUnits(width=0.7, seed=0)"

The file holds the training samples of a `mh_lightning.data.TensorFile`: x_train, y_train and, if it has them,
domain_train; test samples are not read. A fifth is held out, drawn anew for each class order; domains come one after
the other, and in each the classes in the order that was drawn.
"""

import ast
import time
from statistics import fmean, stdev

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.report import parser, report
from mh_lightning import heads

HELD_OUT = 0.2


def options_of(head: str) -> tuple[str, dict[str, object]]:
    """A head's name and its options.

    Example:
        >>> options_of("KernelMemoryUnits(width=0.7)")
        ('KernelMemoryUnits', {'width': 0.7})
    """
    tree = ast.parse(head, mode="eval").body
    if isinstance(tree, ast.Call):
        called = ast.unparse(tree.func)
        return called, {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords}
    return ast.unparse(tree), {}


def stream(entries: dict[str, Tensor], order: int, in_a_task: int) -> tuple[Tensor, Tensor]:
    """Indices of training samples in the order of a stream, and of those held out."""
    y = entries["y_train"].long()
    domains = entries.get("domain_train", torch.zeros_like(y))
    generator = torch.Generator().manual_seed(order)
    places = torch.randperm(len(y), generator=generator)
    parts = train_test_split(places, test_size=HELD_OUT, random_state=order, stratify=y[places])
    train, held_out = (torch.as_tensor(part) for part in parts)
    classes = int(y.max()) + 1
    task_of_class = torch.randperm(classes, generator=generator) // in_a_task
    tasks = domains[train] * classes + task_of_class[y[train]]
    return train[tasks.argsort(stable=True)], held_out


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print, and return accuracies, the mean of all classes' ones, one for each class order."""
    given = parser(__doc__, ("cpu", "cuda"))
    given.add_argument("--features", required=True, help="file of tensors")
    given.add_argument("--heads", nargs="+", required=True, help="of mh_lightning.heads, with options as in Python")
    given.add_argument("--in_a_task", type=int, default=1, help="classes in a task")
    given.add_argument("--orders", type=int, default=5, help="class orders, each with samples of its own held out")
    options = given.parse_args(arguments)
    entries = torch.load(options.features, weights_only=True)
    x, y = entries["x_train"].to(options.device), entries["y_train"].long().to(options.device)
    classes = int(y.max()) + 1
    print("| head | accuracy, % | standard error | seconds |\n|---|---|---|---|", flush=True)
    found: dict[str, list[float]] = {}
    for head in options.heads:
        name, settings = options_of(head)
        found[head], started = [], time.perf_counter()
        for order in range(options.orders):
            train, held_out = stream(entries, order, options.in_a_task)
            torch.manual_seed(order)
            learner = getattr(heads, name)(x.shape[1], classes, **settings).to(options.device)
            learner.update(x[train], y[train])
            correct = (learner(x[held_out]).argmax(dim=1) == y[held_out]).double()
            of_class = [correct[y[held_out] == label].mean() for label in y[held_out].unique()]
            found[head].append(float(torch.stack(of_class).mean()))
        error = stdev(found[head]) / options.orders**0.5 if options.orders > 1 else float("nan")
        seconds = (time.perf_counter() - started) / options.orders
        print(f"| {head} | {100 * fmean(found[head]):.2f} | {100 * error:.2f} | {seconds:.1f} |", flush=True)
    report(options, accuracies=found)
    return found


if __name__ == "__main__":
    main()
