"""Averaged gradient episodic memory: no step against the gradient of earlier tasks."""

import torch
from torch import Tensor

from mh_lightning.distributed import sum_over_ranks, world_size
from mh_lightning.methods.base import Batch
from mh_lightning.methods.replay import ReplayMethod


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""The gradient without its part against a reference: g if :math:`g \cdot r \ge 0`, else
    :math:`g - \frac{g \cdot r}{r \cdot r} r`.

    Args:
        gradient: g, (p,).
        reference: r, (p,).

    Example:
        >>> project(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0]))
        tensor([1., 0.])
    """
    product = gradient @ reference
    if product >= 0:
        return gradient
    return gradient - product / (reference @ reference) * reference


class AveragedGEM(ReplayMethod):
    """A-GEM: projects each step's gradient so that the loss on samples of earlier tasks does not rise.

    The samples come from a reservoir; its part from earlier tasks is the reference.

    Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, equation 11.

    See `ReplayMethod` for the arguments; `replay_batch_size` is that of the reference.
    """

    needs_task_borders = True

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the batch alone."""
        loss = super().training_loss(batch)
        self._task = self.task
        self.remember(batch)
        return loss

    def adjust_gradients(self) -> None:
        """Project."""
        assert self.replay_buffer is not None
        drawn = self.replay_buffer.draw(self.replay_batch_size, before_task=self._task)
        if drawn is None:
            return
        inputs, targets, _ = self.share(drawn)
        with self.evaluating(), torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            gradients = self.gradients(self.mean_loss(self(inputs), targets, len(drawn[1])))
        reference = sum_over_ranks(_flat(gradients)) / world_size()
        trained = list(self.trained_parameters().values())
        gradient = _flat([torch.zeros_like(one) if one.grad is None else one.grad.to_dense() for one in trained])
        projected = project(gradient, reference)
        if projected is not gradient:
            for one, part in zip(trained, torch.split(projected, [one.numel() for one in trained]), strict=True):
                one.grad = part.view_as(one)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
