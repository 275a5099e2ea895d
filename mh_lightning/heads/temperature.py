"""Probabilities from answers of any scale: one temperature, from samples that were learnt, as if they had not been."""

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.heads.sample_store import draw_places

PROBES = 128
MOST_LEVERAGE = 0.95  # more is rounding, or that of sums which were inferred, and would let one sample decide
WIDEST = 12.0  # natural logarithms of a temperature, around that of the answers' spread


class Probes(nn.Module):
    """Some samples of a stream, each as likely to be among them as any other (reservoir sampling).

    Args:
        num_features: n.

    Attributes:
        features: (128, n), float32.
        classes: (128,), int32.
        seen: samples of the stream.
    """

    features: Tensor
    classes: Tensor
    seen: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(PROBES, num_features, dtype=torch.float32))
        self.register_buffer("classes", torch.zeros(PROBES, dtype=torch.int32))
        self.register_buffer("seen", torch.tensor(0))

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Keep some of features (b, n) of classes (b,)."""
        seen, free = int(self.seen), max(PROBES - int(self.seen), 0)
        self.features[seen : seen + free][: len(targets)] = features[:free].float()
        self.classes[seen : seen + free][: len(targets)] = targets[:free].int()
        if len(targets) > free:
            drawn = draw_places(0, seen + free, len(targets) - free, PROBES)
            places, rows = (torch.from_numpy(part).to(targets.device) for part in drawn)
            self.features[places] = features[free:][rows].float()
            self.classes[places] = targets[free:][rows].int()
        self.seen += len(targets)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Features (p, n), float32, and classes (p,); what leaves float32 is not among them."""
        features, classes = self.features[: int(self.seen)], self.classes[: int(self.seen)].long()
        finite = features.isfinite().all(dim=1)
        return features[finite], classes[finite]


def left_out(answers: Tensor, targets: Tensor, leverage: Tensor) -> Tensor:
    r"""What regressions would answer samples, had they not been learnt: :math:`(o - h y) / (1 - h)`.

    Args:
        answers: o, (p, C).
        targets: one-hot classes y, (p, C).
        leverage: h, how much of its own target each answer holds, (p,); what is above .95 is taken for that.

    Example:
        >>> left_out(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.25]))
        tensor([[0.3333, 0.6667]])
    """
    h = leverage.unsqueeze(1).to(answers.dtype).clamp(0, MOST_LEVERAGE)
    return (answers - h * targets) / (1 - h)


def best_temperature(answers: Tensor, classes: Tensor) -> float:
    r"""The temperature T of least negative log-likelihood of softmax(answers / T).

    One more sample, of which nothing is known, is counted in, so that T stays above 0 where all answers are right.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        answers: (p, C), of the classes that were seen; rows that are not finite are left out.
        classes: their places among these, (p,).

    Returns:
        T; 1 where answers tell nothing.

    Example:
        >>> answers = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(best_temperature(answers, torch.tensor([0, 0, 0, 1])), 1)
        2.4
    """
    finite = answers.isfinite().all(dim=1)
    answers, classes = answers[finite].double().cpu(), classes[finite].cpu()
    spread = float((answers - answers.mean(dim=1, keepdim=True)).abs().median()) if answers.numel() else 0.0
    if answers.shape[1] < 2 or not spread > 0 or not math.isfinite(spread):
        return 1.0
    smoothing = 1 / (len(answers) + 1)

    def loss(exponent: float) -> float:
        scaled = answers * (math.exp(-exponent) / spread)
        return float(F.cross_entropy(scaled, classes, label_smoothing=smoothing))

    found = minimize_scalar(loss, bounds=(-WIDEST, WIDEST), method="bounded")
    return spread * math.exp(float(found.x))
