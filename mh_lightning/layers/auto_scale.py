"""The scale of the data, learnt from the stream, in place of hand-set widths and temperatures."""

import math

import torch
from torch import Tensor

from mh_lightning.functional import Floats
from mh_lightning.layers.wide_state import WideState, at_least_float32

AUTO = "auto"
SHARPNESS = 25.0  # softmax's inverse temperature for responses between 0 and 1
WIDTHS = 10.0  # the mean squared distance is ten widths
CENTRED_AFTER = 100  # samples
SMALLEST = 1e-18  # mean squared distance that is divided by, lest there are no numbers for samples that are all zero


class AutoScale(WideState):
    r"""A running estimate of how far apart the training samples are, and what follows from it.

    From the n samples z in key space that were learnt so far, :math:`S = 2\,\mathrm{mean}\,\|z - c\|^2` with
    :math:`c = \sum z / (n + 100)`. With c the samples' mean, S would be the mean squared distance between two of them.
    But the first task of a stream may be a single cloud, much narrower than the data, so c sets out from the origin;
    what this adds to S fades with the square of n. The numbers :math:`\sigma = S / (10 \sqrt d)` and
    :math:`\gamma = 50 \sqrt d / S` scale with the data, so that :math:`\|z - K\|^2 / \sigma` and
    :math:`\gamma\,z \cdot K` do not. Before the first sample, S is the mean squared distance between two initial keys.

    Samples are added where keys move, after the ranks' samples were gathered; all of them count alike, whatever the
    batches they come in.

    Args:
        key_size: d.
        start: S before the first sample.
        device: of the state.
        dtype: of the state; at least float32, and it stays so.

    Attributes:
        seen: n, integer.
        mean: of the samples, (d,).
        variance: mean squared distance to that mean.
        squared_distance: S.

    Example:
        >>> scale = AutoScale(key_size=1, start=1.0)
        >>> scale.add(torch.tensor([[-1.0], [1.0]]))
        >>> scale.squared_distance, scale.sigma_eu()
        (tensor(2.), tensor(0.2000))
    """

    wide = ("mean", "variance", "squared_distance")

    seen: Tensor
    mean: Tensor
    variance: Tensor
    squared_distance: Tensor

    def __init__(
        self,
        key_size: int,
        start: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.start = start
        dtype = at_least_float32(dtype or torch.get_default_dtype())
        self.register_buffer("seen", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("mean", torch.zeros(key_size, dtype=dtype, device=device))
        self.register_buffer("variance", torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("squared_distance", torch.full((), start, dtype=dtype, device=device))

    def reset(self) -> None:
        """Forget the samples."""
        for state in (self.seen, self.mean, self.variance):
            state.zero_()
        self.squared_distance.fill_(self.start)

    def sigma_eu(self) -> Tensor:
        """Width of the euclidean response."""
        return self.squared_distance.clamp_min(SMALLEST) / (WIDTHS * math.sqrt(len(self.mean)))

    def gamma_alpha(self) -> Tensor:
        """Inverse temperature for responses that are products over sqrt(d)."""
        return 2 * SHARPNESS * math.sqrt(len(self.mean)) / self.squared_distance.clamp_min(SMALLEST)

    def add(self, z: Tensor, usable: Tensor | None = None) -> None:
        """Count samples in, (b, d) with b > 0, or those of them that are `usable`, (b,); the others must be finite."""
        weights = z.new_ones(len(z)) if usable is None else usable.to(z.dtype)
        count = weights.sum()
        self.seen += count.long()
        weights = weights / count.clamp_min(1)
        seen = self.seen.to(z.dtype)
        batch_mean = weights @ z
        part = count / seen.clamp_min(1)
        step = batch_mean - self.mean
        spread = weights @ (z - batch_mean).square().sum(1)
        # averages, not sums: they do not overflow
        self.variance += part * (spread - self.variance + (1 - part) * step.square().sum())
        self.mean += part * step
        uncentred = (CENTRED_AFTER / (CENTRED_AFTER + seen)).square() * self.mean.square().sum()
        counted = count > 0  # before the first sample, there is another start
        self.squared_distance.copy_(torch.where(counted, 2 * (self.variance + uncentred), self.squared_distance))

    def add_one(self, z: Floats) -> None:
        """As `add`, for one sample (d,), in NumPy."""
        self.seen.numpy()[...] += 1
        seen, mean, variance = int(self.seen), self.mean.numpy(), self.variance.numpy()
        step = z - mean
        variance += (float(step @ step) * (1 - 1 / seen) - float(variance)) / seen
        mean += step / seen
        uncentred = (CENTRED_AFTER / (CENTRED_AFTER + seen)) ** 2 * float(mean @ mean)
        self.squared_distance.fill_(2 * (float(variance) + uncentred))


def sigma_and_gamma(
    sigma_eu: float | str, gamma_alpha: float | str, scale: AutoScale | None
) -> tuple[float | Tensor, float | Tensor]:
    """The width of euclidean responses and the sharpness of attention, the one that is "auto" from a scale."""
    sigma: float | Tensor = 1.0 if isinstance(sigma_eu, str) else sigma_eu
    if scale is None:
        assert not isinstance(gamma_alpha, str)
        return sigma, gamma_alpha
    if isinstance(gamma_alpha, str):
        return sigma, scale.gamma_alpha()
    return scale.sigma_eu(), gamma_alpha
