"""A backbone that learns the first task, before heads in closed form learn all of them on what it then gives."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from mh_lightning.distributed import broadcast_from_first_rank, world_size
from mh_lightning.errors import UserError, require
from mh_lightning.long_work import with_cost
from mh_lightning.methods.base import ContinualMethod
from mh_lightning.methods.steps import OptimizerStep
from mh_lightning.methods.task_samples import shows_progress
from mh_lightning.random_numbers import seed_from


@dataclass(frozen=True)
class FirstTaskAdaptation:
    """Trains what a backbone has to train, such as its `peft`, on the first task, with a linear classifier that is then
    thrown away, by SGD on the cross-entropy; the learning rate falls to zero in a cosine. After that the backbone is
    frozen, and what can be merged into its weights is.

    Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and
    Adaptivity are All You Need" (APER), IJCV 2024, without the features of the original model beside; McDonnell et al.,
    "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023, phase 1.

    Args:
        epochs: passes over the first task's training samples, at least 1.
        learning_rate: at the start, above 0.
        batch_size: over all devices, at least 1.
        momentum: in [0, 1).
        weight_decay: at least 0.

    Raises:
        UserError: if an option is out of range.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    batch_size: int = 48
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        option = "model.init_args.first_task_adaptation"
        for name in ("epochs", "batch_size"):
            require(f"{option}.{name}", getattr(self, name), at_least=1, whole=True)
        require(f"{option}.learning_rate", self.learning_rate, above=0, below=math.inf)
        require(f"{option}.momentum", self.momentum, at_least=0, below=1)
        require(f"{option}.weight_decay", self.weight_decay, at_least=0, below=math.inf)

    def check(self, method: ContinualMethod) -> None:
        """See that there is something to train, and something to tell apart.

        Raises:
            UserError: otherwise.
        """
        option = "model.init_args.first_task_adaptation"
        if method.stream.feature_cache is not None:
            raise UserError(
                f"{option}: the features of all images change with the first task, so they cannot be kept from before; "
                "leave data.feature_cache out."
            )
        if not any(parameter.requires_grad for parameter in method.backbone.parameters()):
            raise UserError(
                f"{option}: the backbone is frozen and has nothing to train; give it backbone.peft, such as "
                "ScaleAndShift, or backbone.frozen=false."
            )
        if len(method.stream.classes_in_training(0)) < 2:
            raise UserError(
                f"{option}: the first task has one class, from which nothing can be told apart; give a larger "
                "data.first_task_size or data.increment."
            )

    def adapt(self, method: ContinualMethod) -> None:
        """Train the backbone on the first task, alike on all ranks.

        Raises:
            UserError: if the loss is not finite.
        """
        classes = method.stream.classes_in_training(0)
        place = torch.full((method.stream.num_classes,), -1, device=method.device)
        place[classes] = torch.arange(len(classes), device=method.device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed_from(0))
            classifier = nn.Linear(method.backbone.num_features, len(classes))
        classifier.to(method.device, next(method.backbone.parameters()).dtype)
        backbone = [parameter for parameter in method.backbone.parameters() if parameter.requires_grad]
        trained = [*backbone, *classifier.parameters()]
        broadcast_from_first_rank(trained)
        optimizer = torch.optim.SGD(trained, self.learning_rate, self.momentum, weight_decay=self.weight_decay)
        schedule = CosineAnnealingLR(optimizer, self.epochs)
        learn = OptimizerStep(optimizer, optimizer.step, shared=trained, share=1 / world_size())
        plugin = method.trainer.precision_plugin
        method.backbone.train()
        epochs: Any = range(self.epochs)
        samples = method.stream.num_samples("train", 0)
        what = f"Adaptation of the backbone to the {samples:,} samples of the first task"
        with torch.enable_grad():
            for epoch in with_cost(epochs, what, "epoch") if shows_progress(method.trainer) else epochs:
                loader: Any = method.stream.joint_train_dataloader(0, epoch, self.batch_size)
                for batch, rows in zip(loader, loader.batch_sampler.sizes, strict=True):
                    x, targets, _ = plugin.convert_input([part.to(method.device) for part in batch])
                    with plugin.forward_context():
                        logits = classifier(method.features(x))
                        loss = method.mean_loss(logits, place[targets], rows)
                    if not bool(loss.detach().isfinite()):
                        raise UserError(
                            "The adaptation to the first task diverged: model.init_args.first_task_adaptation."
                            f"learning_rate={self.learning_rate} is too large."
                        )
                    learn(loss)
                schedule.step()
        optimizer.zero_grad()
