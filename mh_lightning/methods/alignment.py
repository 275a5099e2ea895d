"""Classifier alignment: heads that were trained one after the other learn, on drawn features, to agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from mh_lightning.distributed import process_rank, sum_over_ranks, world_size
from mh_lightning.errors import UserError, require
from mh_lightning.heads import ClassGaussians, TaskHeads
from mh_lightning.heads.class_gaussians import Covariance, check_options
from mh_lightning.layers import MHLinear
from mh_lightning.long_work import with_cost
from mh_lightning.methods.steps import OptimizerStep

SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class ClassifierAlignment:
    r"""Trains all heads together on features drawn from a normal distribution of each class seen.

    After task T, counted from 0, each epoch draws `samples_per_class` features of every class from
    :math:`N(s\,\mu_c, S_c)`, with :math:`s = 0.9 + 0.1 (t + 1) / (T + 1)` for a class of task t, shuffles them, and
    takes steps of SGD on the cross-entropy over the logits of all classes seen; the learning rate falls to zero in a
    cosine, epoch by epoch. Unless `logit_norm` is 0, logits are first divided by it and by the mean over tasks of the
    norm of each task's logits.

    Ranks share each batch, and end up with the weights of one process, up to rounding.

    Args:
        epochs: passes over drawn features, at least 1.
        samples_per_class: in an epoch, at least 1.
        batch_size: over all devices.
        learning_rate: at the start, above 0.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, at least 0.
        logit_norm: temperature of normalised logits, at least 0; 0 leaves logits as they are.
        freeze_keys: keep the keys of Memory Heads, and their counters, as they are.
        covariance: how covariances are kept, in checkpoints too: "full", "low_rank" or "shared"; see
            `mh_lightning.heads.ClassGaussians` for what each takes.
        rank: of "low_rank", at least 1.
        jitter: above 0, added to the covariances' diagonal.

    Raises:
        UserError: if an option is out of range.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
    ICCV 2023, section 3.3; the scale of the means is in its code.
    """

    epochs: int = 5
    samples_per_class: int = 256
    batch_size: int = 256
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    logit_norm: float = 0.1
    freeze_keys: bool = True
    covariance: Covariance = "full"
    rank: int = 32
    jitter: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("epochs", "samples_per_class", "batch_size"):
            require(f"model.init_args.alignment.{name}", getattr(self, name), at_least=1, whole=True)
        require("model.init_args.alignment.learning_rate", self.learning_rate, above=0, below=math.inf)
        require("model.init_args.alignment.momentum", self.momentum, at_least=0, below=1)
        for name in ("weight_decay", "logit_norm"):
            require(f"model.init_args.alignment.{name}", getattr(self, name), at_least=0, below=math.inf)
        try:
            check_options(self.covariance, self.rank, self.jitter)
        except UserError as error:
            raise UserError(f"model.init_args.alignment.{error}") from error

    def class_gaussians(self, num_features: int, num_classes: int) -> ClassGaussians:
        """What keeps the classes' distributions."""
        return ClassGaussians(num_features, num_classes, self.covariance, self.rank, self.jitter)

    def align(self, heads: TaskHeads, gaussians: ClassGaussians, seed: int, quiet: bool = True) -> None:
        """Train all heads that have begun.

        Args:
            heads: in a state where nothing is trained; they are left so.
            gaussians: of all classes that have begun.
            seed: of what is drawn, the same on all ranks.
            quiet: no progress bar.

        Raises:
            UserError: if the loss or the logits are not finite.
        """
        begun = heads.heads[: int(heads.tasks_begun)]
        layers = [module for module in begun.modules() if isinstance(module, MHLinear)]
        begun.requires_grad_(True)
        if self.freeze_keys:
            for layer in layers:
                layer.K.requires_grad_(False)
        heads.train(not self.freeze_keys)  # Memory Heads in evaluation mode leave keys and counters as they are
        trained = [parameter for parameter in begun.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, self.learning_rate, self.momentum, weight_decay=self.weight_decay)
        schedule = CosineAnnealingLR(optimizer, self.epochs)
        moving = [] if self.freeze_keys else layers
        learn = OptimizerStep(optimizer, optimizer.step, moving, shared=trained)
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            epochs: Sequence[int] = range(self.epochs)
            what = f"Alignment on {self.samples_per_class * len(heads.classes_begun):,} drawn features an epoch"
            for _ in epochs if quiet else with_cost(epochs, what, "epoch"):
                features, targets = self.draw(heads, gaussians, generator)
                for batch in zip(*(torch.split(part, self.batch_size) for part in (features, targets)), strict=True):
                    learn(self._loss(heads, *batch))
                schedule.step()
        heads.requires_grad_(False)
        optimizer.zero_grad()
        heads.eval()
        self._check_finite(torch.cat(heads.logits_by_task(features[:1].to(_dtype_of(heads))), dim=1).sum().item())

    def draw(self, heads: TaskHeads, gaussians: ClassGaussians, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features (C' · samples_per_class, n) of the C' classes that have begun, shuffled, and the place of each one's
        class among them, in the order of the stream.
        """
        tasks = int(heads.tasks_begun)
        parts = [
            gaussians.draw(label, self.samples_per_class, generator, 0.9 + 0.1 * (task + 1) / tasks)
            for task, group in enumerate(heads.class_groups[:tasks])
            for label in group
        ]
        places = torch.arange(len(parts)).repeat_interleave(self.samples_per_class)
        order = torch.randperm(len(places), generator=generator)
        features = torch.cat(parts)
        return features[order.to(features.device)], places[order].to(features.device)

    def _loss(self, heads: TaskHeads, features: Tensor, targets: Tensor) -> Tensor:
        """What this rank has of the mean loss of a batch."""
        rows = slice(process_rank(), None, world_size())
        logits = heads.logits_by_task(features[rows].to(_dtype_of(heads)))
        loss = F.cross_entropy(self.normalised(logits).float(), targets[rows], reduction="sum") / len(targets)
        self._check_finite(sum_over_ranks(loss.detach()).item())  # on all ranks alike
        return loss

    def _check_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"The alignment of the heads diverged: model.init_args.alignment.learning_rate={self.learning_rate} is "
                "too large."
            )

    def normalised(self, logits: list[Tensor]) -> Tensor:
        """All logits (b, C') of tasks' logits (b, classes of the task), normalised if that is asked for.

        Example:
            >>> one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[15.0]])
            >>> ClassifierAlignment(logit_norm=0.1).normalised([one, other])
            tensor([[ 3.,  4., 15.]])
        """
        together = torch.cat(logits, dim=1)
        if self.logit_norm == 0:
            return together
        norms = torch.stack([part.norm(dim=1) + SMALLEST_NORM for part in logits], dim=1)
        return together / norms.mean(dim=1, keepdim=True) / self.logit_norm


def _dtype_of(heads: TaskHeads) -> torch.dtype:
    return next(heads.parameters()).dtype
