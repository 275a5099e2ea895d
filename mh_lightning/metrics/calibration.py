"""How far probabilities can be believed: expected calibration error and negative log-likelihood."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

CALIBRATION = ("expected_calibration_error", "negative_log_likelihood")
BINS = 15


class Calibration(Metric):
    r"""Expected calibration error and negative log-likelihood of class probabilities, the softmax of logits.

    With :math:`\hat p` the probability of the predicted class and 15 bins of equal width,

    .. math::
        \mathrm{ECE} = \sum_b \frac{|b|}{N} \,\Bigl| \frac{1}{|b|} \sum_{i \in b} \mathbb 1[\hat y_i = y_i]
            - \frac{1}{|b|} \sum_{i \in b} \hat p_i \Bigr|, \qquad
        \mathrm{NLL} = -\frac1N \sum_i \log p_i(y_i)

    States are sums, so batches may come in any order and from any rank.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.

    Attributes:
        bins: samples, correct ones and the sum of probabilities of each bin, (3, 15), float64.
        loss: sum of the negative log-likelihoods, float64.

    Example:
        >>> metric = Calibration()
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'expected_calibration_error': 0.3, 'negative_log_likelihood': 0.916}
    """

    full_state_update = False
    bins: Tensor
    loss: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("bins", torch.zeros(3, BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits (b, C) of samples of classes (b,)."""
        log_probabilities = F.log_softmax(logits.double(), dim=1)
        confidences, predictions = log_probabilities.max(dim=1)
        confidences = confidences.exp()
        places = (confidences * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)  # a bin holds its upper end
        counted = torch.stack([torch.ones_like(confidences), (predictions == targets).double(), confidences])
        self.bins.index_add_(1, places, counted)
        self.loss += F.nll_loss(log_probabilities, targets, reduction="sum")

    def compute(self) -> dict[str, Tensor]:
        """Both, NaN without samples."""
        samples, correct, confidence = self.bins
        error = (correct - confidence).abs().sum() / samples.sum()
        return dict(zip(CALIBRATION, (error, self.loss / samples.sum()), strict=True))
