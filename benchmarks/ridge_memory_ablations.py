"""What each choice of the Ridge Memory Head is worth, on validation samples, beside the bytes that it keeps.

    python -m benchmarks.ridge_memory_ablations --root data --cache data/features --output docs/ridge_memory_head
    python -m benchmarks.ridge_memory_ablations --root data --orders 2 --only "10 units" "30 units"

Split Fashion-MNIST: 20,000 training images, a fifth of them held out for validation, drawn anew for each class order;
five tasks of two classes, one pass. Test data are not read. Writes a table, means over class orders with differences
to the shipped settings paired by order, and a CSV file.
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from sklearn.cluster import KMeans
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.feature_cache import backbone
from mh_lightning.data import FashionMNIST
from mh_lightning.data.features import FeatureCache
from mh_lightning.experiments.statistics import Interval, mean_interval, paired_difference
from mh_lightning.functional import spread
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    RandomProjectionRidge,
    RidgeMemoryUnits,
    StreamingLinearDiscriminant,
)
from mh_lightning.heads.random_projection import draw_projection
from mh_lightning.heads.settling_keys import Attracted, SettlingKeys
from mh_lightning.methods import ClosedForm

FEATURES, CLASSES, IN_A_TASK = 1280, 10, 2
NEVER = 10**9
BASE = "10 units"

Samples = tuple[Tensor, Tensor]
Make = Callable[[Tensor], ClosedFormHead]  # from the training features, which only keys found beforehand look at


def all_features(root: str, cache: str, samples: int) -> Samples:
    """Features (samples, 1280) and classes of training images."""
    data = FashionMNIST(root=root, max_train_samples=samples, max_test_samples=10, feature_cache=FeatureCache(cache))
    method = ClosedForm(backbone(), ClassMeans)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer.strategy.connect(method)
    data.setup("fit")
    batches = [batch for task in range(data.num_tasks) for batch in data.unaugmented_train_dataloader(task)]
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def stream(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Training samples in the order of a stream, and validation samples."""
    x, y = samples
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(y), generator=generator)
    train, validation = (torch.as_tensor(part) for part in train_test_split(places, test_size=0.2, random_state=seed))
    task_of_class = torch.randperm(CLASSES, generator=generator) // IN_A_TASK
    train = train[task_of_class[y[train]].argsort(stable=True)]
    return (x[train], y[train]), (x[validation], y[validation])


class FixedKeys(SettlingKeys):
    """Keys that were there before the stream and do not move; the temperature still comes from the stream."""

    def __init__(self, keys: Tensor, delta: int) -> None:
        super().__init__(*keys.shape, delta)
        self.K.copy_(keys)
        self.mu.fill_(1)

    def learn(self, z: Tensor) -> Attracted:
        squared = torch.cdist(z, self.K).square().sort(dim=1).values
        self.seen += len(z)
        self.gap += ((squared[:, 1] - squared[:, 0]).mean() - self.gap) * len(z) / self.seen
        attention = self.attend(z)
        alphas = spread(attention.alphas, attention.units, len(self.K)).squeeze(1)
        self.weight += alphas.sum(dim=0)
        return Attracted(alphas, [])


class OneGramUnits(RidgeMemoryUnits):
    r"""One Gram matrix for all units, :math:`A_j \approx N_j (S + \bar h_j \bar h_j^\top)`.

    :math:`N_j = \sum_i \alpha_{ij}`, :math:`\bar h_j` is the mean of what the unit attracts, and S the covariance
    inside units that all share.
    """

    def __init__(self, num_features: int, num_classes: int, key_mem_units: int = 10) -> None:
        super().__init__(num_features, num_classes, key_mem_units)
        self.total = torch.zeros_like(self.gram[0])
        self.state_bytes -= 4 * (key_mem_units - 1) * self.total.numel()

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        super().accumulate(features, targets)
        hidden = self.project(self.normalise(features))
        self.total.addmm_(hidden.T, hidden)

    def total_gram(self) -> Tensor:
        return self.total.double()

    def solve(self) -> tuple[Tensor, ...]:
        sums = self.class_sums.sum(dim=2)  # of h, as the classes of a sample sum to 1
        weights = self.overlap.sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        means = sums / weights.unsqueeze(1)
        inside = (self.total_gram() - sums.T @ means) / weights.sum()
        for unit, weight in enumerate(weights):
            self.gram[unit] = weight * inside + torch.outer(sums[unit], means[unit])
        return super().solve()


class LowRankUnits(RidgeMemoryUnits):
    """Units keep the largest eigenvectors of their Gram matrices and a diagonal; their sum is kept whole.

    Each thousand samples or so, when samples that wait are added, the matrices are cut back.
    """

    def __init__(self, rank: int, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.rank = rank
        self.total = torch.zeros_like(self.gram[0])
        size, units = len(self.total), len(self.gram)
        self.state_bytes += 4 * (size**2 + units * (rank + 1) * size - units * size**2)

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        before = self.gram.clone()
        super().accumulate(features, targets)
        hidden = self.project(self.normalise(features))
        self.total.addmm_(hidden.T, hidden)
        for unit in (self.gram != before).any(dim=(1, 2)).nonzero().flatten().tolist():
            self.gram[unit] = cut_back(self.gram[unit], self.rank)

    def total_gram(self) -> Tensor:
        return self.total.double()


class SmallUnits(ClosedFormHead):
    """Units see few directions (n, r) of the features, and correct what one regression of these leaves over; the shared
    unit sees all features, and has sums of its own.
    """

    def __init__(self, directions: Tensor, kept: bool) -> None:
        super().__init__(len(directions), CLASSES)
        self.directions, self.whole = directions, RidgeMemoryUnits(len(directions), CLASSES, 1)
        self.units, self.one = (
            RidgeMemoryUnits(directions.shape[1], CLASSES, units, normalization="none") for units in (10, 1)
        )
        self.state_bytes = self.units.state_bytes + self.whole.state_bytes + 4 * directions.numel() * kept

    def see(self, features: Tensor) -> Tensor:
        return self.whole.normalise(features) @ self.directions

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        self.whole.update(features, targets)
        for head in (self.units, self.one):
            head.update(self.see(features), targets)

    def solve(self) -> tuple[Tensor, ...]:
        for head in (self.whole, self.units, self.one):
            head.ensure_solved()
        return ()

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        seen = self.see(features)
        return self.whole(features) + self.units(seen) - self.one(seen)


def cut_back(gram: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, with the diagonal as it was."""
    left, values, _ = torch.svd_lowrank(gram, q=rank + 8)
    low = (left[:, :rank] * values[:rank]) @ left[:, :rank].T
    return low + torch.diag((gram.diagonal() - low.diagonal()).clamp_min(0))


def ours(**options: Any) -> Make:
    """The head with options."""
    return lambda x: RidgeMemoryUnits(FEATURES, CLASSES, **options)


def low_rank(rank: int) -> Make:
    """Units of a rank."""
    return lambda x: LowRankUnits(rank, FEATURES, CLASSES)


def random_directions(size: int) -> Make:
    """Units of so many of them."""
    return lambda x: SmallUnits(draw_projection(FEATURES, size, 0) / math.sqrt(size), kept=False)


def principal_directions(size: int) -> Make:
    """Units of so many of them, found from the first thousand samples."""

    def make(x: Tensor) -> ClosedFormHead:
        z = RidgeMemoryUnits(FEATURES, CLASSES, 1).normalise(x[:1000])
        return SmallUnits(torch.linalg.svd(z, full_matrices=False).Vh[:size].T.contiguous(), kept=True)

    return make


def keys_beforehand(find: Callable[[Tensor], Tensor]) -> Make:
    """A head whose keys come from a first look at all training samples."""

    def make(x: Tensor) -> ClosedFormHead:
        head = RidgeMemoryUnits(FEATURES, CLASSES)
        head.keys = FixedKeys(find(head.normalise(x)), head.keys.delta)
        return head

    return make


def k_means(z: Tensor) -> Tensor:
    """Ten centres."""
    return torch.from_numpy(KMeans(10, n_init=1, random_state=0).fit(z.numpy()).cluster_centers_)


def random_samples(z: Tensor) -> Tensor:
    """Ten samples."""
    return z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:10]]


def settled(z: Tensor) -> Tensor:
    """Ten keys after one pass."""
    keys = SettlingKeys(10, FEATURES)
    keys.learn(z)
    return keys.K


VARIANTS: dict[str, Make] = {
    BASE: ours(),
    **{f"{units} units": ours(key_mem_units=units) for units in (1, 2, 3, 5, 20, 30)},
    **{f"delta {delta}": ours(delta=delta) for delta in (1, 3, 10)},
    **{f"ridge {ridge:g}": ours(ridge=ridge) for ridge in (0.03, 0.1, 0.3, 1.0)},
    "keys stay at their first sample": ours(settle=1),
    "keys move for ever": ours(settle=NEVER),
    "keys are random samples": keys_beforehand(random_samples),
    "keys settle, sums of a second pass": keys_beforehand(settled),
    "keys by k-means beforehand": keys_beforehand(k_means),
    "no shared unit": ours(shared_unit=False),
    "normalization l2": ours(normalization="l2"),
    "normalization none": ours(normalization="none"),
    "one Gram matrix": lambda x: OneGramUnits(FEATURES, CLASSES),
    **{f"rank {rank} and diagonal": low_rank(rank) for rank in (16, 64, 256)},
    **{f"units of {size} directions": random_directions(size) for size in (200, 400, 600)},
    **{f"units of {size} principal directions": principal_directions(size) for size in (256, 400)},
    **{f"{size} projections beside": ours(projections_beside=size) for size in (3000, 5000)},
    **{f"{size} projections": ours(num_projections=size) for size in (300, 600, 1000)},
    **{f"1 unit, {size} projections": ours(key_mem_units=1, num_projections=size) for size in (1000, 2000)},
    "RanPAC, 1000 projections": lambda x: RandomProjectionRidge(FEATURES, CLASSES, 1000),
    "RanPAC, 2875 projections": lambda x: RandomProjectionRidge(FEATURES, CLASSES, 2875),
    "streaming LDA": lambda x: StreamingLinearDiscriminant(FEATURES, CLASSES),
}


def bytes_of(head: ClosedFormHead) -> int:
    """Bytes of the state."""
    stated: int | None = getattr(head, "state_bytes", None)
    return stated or sum(part.numel() * part.element_size() for part in head.state_dict().values())


@torch.no_grad()
def accuracy(make: Make, samples: Samples, order: int) -> tuple[float, int]:
    """Validation accuracy after the stream, and bytes of the state."""
    (x, y), (x_validation, y_validation) = stream(samples, order)
    with torch.random.fork_rng():  # decompositions of a low rank draw numbers
        torch.manual_seed(order)
        head = make(x)
        head.update(x, y)
    return float((head(x_validation).argmax(dim=1) == y_validation).double().mean()), bytes_of(head)


def per_cent(interval: Interval | None, sign: str = "") -> str:
    """Mean and half-width."""
    if interval is None:
        return ""
    width = "" if interval.half_width is None else f" ± {100 * interval.half_width:.1f}"
    return f"{100 * interval.mean:{sign}.1f}{width}"


def main(arguments: list[str] | None = None) -> dict[str, dict[int, float]]:
    """Measure, print, write, and return accuracies by variant and order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--cache", default="data/features", help="folder of kept features")
    parser.add_argument("--samples", type=int, default=20_000, help="training images, validation included")
    parser.add_argument("--orders", type=int, default=5, help="class orders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--output", type=Path, help="folder for ablations.csv")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[int, float]] = {}
    rows: list[tuple[str, int, int, float]] = []
    try:
        samples = all_features(options.root, options.cache, options.samples)
        print("| variant | accuracy, % | difference | state, MB |\n|---|---|---|---|")
        for name in dict.fromkeys([BASE, *options.only]):
            measured = {order: accuracy(VARIANTS[name], samples, order) for order in range(options.orders)}
            rows += [(name, order, size, value) for order, (value, size) in measured.items()]
            found[name] = {order: value for order, (value, _) in measured.items()}
            runs, base = [{(order, None): value for order, value in found[one].items()} for one in (name, BASE)]
            difference = paired_difference(runs, base) if name != BASE else None
            print(f"| {name} | {per_cent(mean_interval(runs))} | {per_cent(difference, '+')} | "
                  f"{rows[-1][2] / 1e6:.3g} |", flush=True)  # fmt: skip
            if options.output:
                with (options.output / "ablations.csv").open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows([("variant", "order", "bytes", "accuracy"), *rows])
    finally:
        torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    main()
