"""Elastic weight consolidation: parameters that an earlier task depends on are held, by their Fisher information."""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError, require
from mh_lightning.methods.base import Head
from mh_lightning.methods.quadratic_penalty import QuadraticPenaltyMethod
from mh_lightning.methods.task_samples import batches_of_task
from mh_lightning.random_numbers import seed_from


class EWC(QuadraticPenaltyMethod):
    r"""Online EWC: the penalty :math:`\frac{\lambda}{2} \sum_i \Omega_i (\theta_i - \theta^*_i)^2` holds each
    parameter near its value after the last task. When a task ends, :math:`\Omega \leftarrow \gamma \Omega + F`, with
    the diagonal of the Fisher information
    :math:`F_i = \mathrm{mean}_x\, \mathrm{E}_y (\partial \log p(y|x) / \partial \theta_i)^2` of its training samples,
    seen as in evaluation, one by one.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; online, and with
    the decay, Schwarz et al., "Progress & Compress", ICML 2018, section 4.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.
        penalty: :math:`\lambda`, at least 0.
        decay: :math:`\gamma` in [0, 1].
        fisher: over which classes y the expectation goes: "empirical", the sample's own, as in most implementations, or
            "exact", all of them as the model believes, which takes a backward pass for each.
        fisher_samples: samples of a task, at least 1, that it is computed from, at random; null for all.
        options: of `ContinualMethod`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        penalty: float = 100.0,
        decay: float = 1.0,
        fisher: Literal["empirical", "exact"] = "empirical",
        fisher_samples: int | None = 1000,
        **options: Any,
    ) -> None:
        super().__init__(backbone, head, **options)
        require("model.init_args.penalty", penalty, at_least=0, below=math.inf)
        require("model.init_args.decay", decay, at_least=0, at_most=1)
        if fisher not in ("empirical", "exact"):
            raise UserError(f"model.init_args.fisher must be 'empirical' or 'exact', got {fisher!r}.")
        if fisher_samples is not None:
            require("model.init_args.fisher_samples", fisher_samples, at_least=1, whole=True)
        self.penalty, self.decay, self.fisher, self.fisher_samples = penalty, decay, fisher, fisher_samples
        self.strength = penalty

    def on_task_end(self, task: int) -> None:
        """Add the task's Fisher information."""
        self.consolidate(self.fisher_information(task), self.decay)

    def fisher_information(self, task: int) -> dict[str, Tensor]:
        """The diagonal F of each trained parameter, by name, the same on all ranks."""
        trained = self.trained_parameters()
        squares = {name: torch.zeros_like(one) for name, one in trained.items()}
        samples = self.stream.num_samples("train", task)
        places = None
        if self.fisher_samples is not None and samples > self.fisher_samples:
            generator = np.random.default_rng(seed_from(self.stream.num_earlier_tasks + task))
            samples, places = self.fisher_samples, generator.choice(samples, self.fisher_samples, replace=False)
        with self.evaluating(), torch.enable_grad():
            for inputs, targets, _ in batches_of_task(self, task, "Fisher information", places):
                for row in range(len(targets)):
                    self._add_squares(inputs[row : row + 1], targets[row], squares, list(trained.values()))
        return {name: sum_over_ranks(total) / samples for name, total in squares.items()}

    def _add_squares(self, x: Tensor, target: Tensor, squares: dict[str, Tensor], trained: list[nn.Parameter]) -> None:
        with self.trainer.precision_plugin.forward_context():
            log_probabilities = torch.log_softmax(self(x).float(), dim=1)[0]
        classes = range(len(log_probabilities)) if self.fisher == "exact" else [int(target)]
        for label in classes:
            weight = log_probabilities[label].detach().exp() if self.fisher == "exact" else 1.0
            kept = len(classes) > 1
            gradients = torch.autograd.grad(log_probabilities[label], trained, retain_graph=kept, allow_unused=True)
            for total, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    total += weight * gradient.to_dense().square()
