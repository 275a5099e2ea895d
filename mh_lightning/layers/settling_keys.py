"""Keys that find their places in one pass, and stay there."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mh_lightning import functional as MF
from mh_lightning.errors import UserError

SHARPNESS = 2.0  # of the softmax, for a difference of two squared distances that is average
DUPLICATES = 16.0  # how many times closer, squared, two keys are than a sample is to its own


class Attracted(NamedTuple):
    """What `SettlingKeys.learn` says of b samples, in their order."""

    alphas: Tensor  # (b, m)
    squares: Tensor  # (m,), sums of their squares
    handed_over: list[tuple[int, int]]  # units that were re-used, and to which unit all that they had goes


class SettlingKeys(nn.Module):
    r"""Keys of m memory units, for statistics that cannot follow when a key moves.

    A sample attends to the `delta` units whose keys are nearest, by a temperature that comes from the data:

    .. math::
        \alpha = \mathrm{softmax}\Bigl(-\frac{2}{\bar g}\,\|z - K_j\|^2\Bigr), \qquad
        \bar g = \mathrm{mean}\,(\|z - K_\text{second}\|^2 - \|z - K_\text{first}\|^2)

    over the samples so far. Sample after sample, in the order of the stream and whatever the batches,

    - the first m different samples become keys;
    - each sample moves the key that it is nearest to by :math:`1/n`, n being the samples that the key has won, so that
      the key is their mean, until n is `settle`: then it stays where it is, and what its unit has learnt stays true;
    - where nothing attracts a sample, a unit is re-used for it: a dead one (fewer than `tau_mu` samples won, none of
      the last `tau_eta`; the oldest), if the sample is farther from its key than the average one; else one of the two
      keys nearest to each other, near-duplicates, if they are less than a quarter as far apart as the sample is from
      its key. What the unit had goes to the nearest other unit, so nothing is lost, and that unit's key becomes the
      mean of both, by samples won.

    Args:
        key_mem_units: m.
        key_size: d.
        delta: units to attend to.
        settle: n at which a key stays, 1 or more.
        tau_mu: wins below which a unit can be dead.
        tau_eta: age from which it is, in samples since it last won.

    Attributes:
        K: keys, (m, d), float32.
        mu: usage, samples won since the unit was last re-used, (m,); 0 for a unit without a key.
        eta: age, (m,).
        key_counter: samples won in all, (m,).
        scrambling_count: units re-used.
        seen: samples.
        gap: mean difference of the squared distances to the second and the first key.
        nearest: mean squared distance to the first key.

    Raises:
        UserError: if an option is out of range.

    Example:
        >>> keys = SettlingKeys(2, 1)
        >>> keys.learn(torch.tensor([[0.0], [1.0], [9.0], [0.0]])).handed_over  # 1 and 0 are near-duplicates
        [(1, 0)]
        >>> keys.K.flatten()
        tensor([0.3333, 9.0000])
    """

    K: Tensor
    mu: Tensor
    eta: Tensor
    key_counter: Tensor
    scrambling_count: Tensor
    seen: Tensor
    gap: Tensor
    nearest: Tensor

    def __init__(
        self,
        key_mem_units: int,
        key_size: int,
        delta: int = 2,
        settle: int = 10,
        tau_mu: int = 10,
        tau_eta: int = 1000,
    ) -> None:
        super().__init__()
        lowest = {"key_mem_units": 1, "delta": 1, "settle": 1, "tau_mu": 0, "tau_eta": 0}
        for (name, least), value in zip(lowest.items(), (key_mem_units, delta, settle, tau_mu, tau_eta), strict=True):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}.")
        self.delta = min(delta, key_mem_units)
        self.settle, self.tau_mu, self.tau_eta = settle, tau_mu, tau_eta
        self.register_buffer("K", torch.zeros(key_mem_units, key_size, dtype=torch.float32))
        for name in ("mu", "eta", "key_counter"):
            self.register_buffer(name, torch.zeros(key_mem_units, dtype=torch.long))
        for name in ("scrambling_count", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        for name in ("gap", "nearest"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def learn(self, z: Tensor) -> Attracted:
        """Take in samples (b, d), and weigh the units for each as it came."""
        walk = _Walk(self)
        alphas = np.zeros((len(z), len(self.K)), dtype=np.float32)
        for row, sample in enumerate(z.detach().to("cpu", torch.float32).numpy()):
            walk.take(sample, alphas, row)
        walk.write_back(self)
        squares = torch.from_numpy(walk.squares).to(z.device)
        return Attracted(torch.from_numpy(alphas).to(z.device), squares, walk.handed_over)

    def attend(self, z: Tensor) -> MF.Attention:
        """The units, and their weights, of samples (b, d), with the keys as they are; needs one sample learnt."""
        weights = self.nearness_weights()
        return self.attend_to_nearest(torch.addmm(weights[-1], z, weights[:-1]))

    def nearness_weights(self) -> Tensor:
        r"""Weights (d + 1, k) of a linear map that tells from z, with a 1 at its end, how near each of the k keys is.

        Instead of squared distances, :math:`2 (z - c)^\top (K_j - c) - \|K_j - c\|^2`, with c the mean key: they differ
        by a number that is the same for all keys, which neither the order nor the softmax sees.
        """
        keys = self.K[: int((self.mu > 0).sum())]  # units get their keys in their order
        centre = keys.mean(dim=0)
        from_centre = keys - centre
        constants = -2 * from_centre @ centre - from_centre.square().sum(dim=1)
        return torch.cat([2 * from_centre.T, constants.unsqueeze(0)])

    def attend_to_nearest(self, nearness: Tensor) -> MF.Attention:
        """The units, and their weights, of samples by what `nearness_weights` says of them, (b, k)."""
        count = min(self.delta, nearness.shape[1])
        return MF.attend(nearness.unsqueeze(1), count, self._gamma(float(self.gap)))

    @staticmethod
    def _gamma(gap: float) -> float:
        return SHARPNESS / gap if gap > 0 else 0.0


class _Walk:
    """The keys while they see one sample after the other, in NumPy: for one sample, PyTorch's calls take longer than
    what they compute.
    """

    def __init__(self, keys: SettlingKeys) -> None:
        self.delta, self.settle, self.tau_mu, self.tau_eta = keys.delta, keys.settle, keys.tau_mu, keys.tau_eta
        self.K: NDArray[np.float32] = keys.K.cpu().numpy().copy()
        counters = (keys.mu, keys.eta, keys.key_counter)
        self.mu, self.eta, self.wins = (counter.cpu().numpy().copy() for counter in counters)
        self.seen, self.recycled = int(keys.seen), int(keys.scrambling_count)
        self.gap, self.nearest = float(keys.gap), float(keys.nearest)
        self.used = int((self.mu > 0).sum())
        self.handed_over: list[tuple[int, int]] = []
        self.squares = np.zeros(len(self.K))
        self._between_keys()

    def write_back(self, keys: SettlingKeys) -> None:
        """Store the keys and counters."""
        counters = {"K": self.K, "mu": self.mu, "eta": self.eta, "key_counter": self.wins}
        for name, values in counters.items():
            getattr(keys, name).copy_(torch.from_numpy(values))
        numbers = {"seen": self.seen, "scrambling_count": self.recycled, "gap": self.gap, "nearest": self.nearest}
        for name, number in numbers.items():
            getattr(keys, name).fill_(number)

    def take(self, z: NDArray[np.float32], alphas: NDArray[np.float32], row: int) -> None:
        """Learn one sample, and write its alphas into their row."""
        squared = self._squared_distances(z)
        winner = int(squared.argmin()) if self.used else 0
        if self.used < len(self.K):
            if self.used == 0 or squared[winner] > 0:
                winner = self.used
                self.used += 1
                squared = self._place(winner, z, squared)
        else:
            unit = self._unit_to_reuse(float(squared[winner]))
            if unit is not None:
                self._hand_over(unit, alphas[:row])
                squared = self._squared_distances(z)
                winner = unit
                squared = self._place(unit, z, squared)
        self.seen += 1
        self._weigh(squared, alphas[row])
        self.mu[winner] += 1
        self.wins[winner] += 1
        self.eta += 1
        self.eta[winner] = 0
        if 1 < self.mu[winner] <= self.settle:
            self.K[winner] += (z - self.K[winner]) / self.mu[winner]
            self._refresh(winner)

    def _squared_distances(self, z: NDArray[np.float32]) -> NDArray[np.float64]:
        difference = self.K[: self.used] - z
        squared: NDArray[np.float64] = np.einsum("md,md->m", difference, difference).astype(np.float64)
        return squared

    def _weigh(self, squared: NDArray[np.float64], alphas: NDArray[np.float32]) -> None:
        count = min(self.delta, self.used)
        units = np.argsort(squared, kind="stable")[: max(count, 2)]
        first = squared[units[0]]
        self.nearest += (first - self.nearest) / self.seen
        if len(units) > 1:
            self.gap += (squared[units[1]] - first - self.gap) / self.seen
        weights = np.exp(SettlingKeys._gamma(self.gap) * (first - squared[units[:count]]))
        weights /= weights.sum()
        alphas[units[:count]] = weights
        self.squares[units[:count]] += weights**2

    def _place(self, unit: int, z: NDArray[np.float32], squared: NDArray[np.float64]) -> NDArray[np.float64]:
        self.K[unit] = z
        self.mu[unit] = self.eta[unit] = 0
        self._refresh(unit)
        if unit == len(squared):
            return np.append(squared, 0.0)
        squared[unit] = 0.0
        return squared

    # --- re-use

    def _unit_to_reuse(self, squared: float) -> int | None:
        if len(self.K) == 1:
            return None
        if squared > self.nearest:
            oldest = int(np.where(self.mu < self.tau_mu, self.eta, -1).argmax())
            if self.mu[oldest] < self.tau_mu and self.eta[oldest] >= self.tau_eta:
                return oldest
        if DUPLICATES * self.closest < squared:
            one, other = np.unravel_index(int(self.between.argmin()), self.between.shape)
            return int(one if self.mu[one] < self.mu[other] else other)
        return None

    def _hand_over(self, unit: int, alphas: NDArray[np.float32]) -> None:
        heir = int(self.between[unit].argmin())
        share = self.mu[unit] / (self.mu[unit] + self.mu[heir])
        self.K[heir] += share * (self.K[unit] - self.K[heir])
        self.mu[heir] += self.mu[unit]
        self._refresh(heir)
        for had in (alphas.T, self.squares):
            had[heir] += had[unit]
            had[unit] = 0
        self.handed_over.append((unit, heir))
        self.recycled += 1

    def _between_keys(self) -> None:
        self.between: NDArray[np.float64] = np.full((len(self.K), len(self.K)), np.inf)
        self.closest = math.inf
        for unit in range(self.used):
            self._refresh(unit)

    def _refresh(self, unit: int) -> None:
        """Squared distances between a key that has changed and the others."""
        squared = self._squared_distances(self.K[unit])
        squared[unit] = np.inf
        self.between[unit, : self.used] = self.between[: self.used, unit] = squared
        self.closest = float(self.between.min())
