"""Keys that find their places in one pass, and stay there."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mh_lightning import functional
from mh_lightning.errors import require

SHARPNESS = 2.0  # of the softmax, for a difference of two squared distances that is average
DUPLICATES = 16.0  # how many times closer, squared, two keys are than a sample is to its own


class Move(NamedTuple):
    """A share of what one unit has goes to another."""

    source: int
    target: int
    share: float


class Attracted(NamedTuple):
    """What `SettlingKeys.learn` says of b samples, in their order."""

    alphas: Tensor  # (b, m), after all moves
    moves: list[Move]  # of what was learnt before these samples


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
      mean of both, by samples won;
    - samples of the past will attend to a new key, too, so its unit takes over a share of what the nearest one has: as
      many samples as `inherited`, and at most half. Else it would know only what came after it, and when a sample came
      would tell its class: good answers while learning, bad ones later.

    Args:
        key_mem_units: m, at least 1.
        key_size: d.
        delta: units to attend to, at least 1.
        settle: n at which a key stays, at least 1.
        tau_mu: wins, at least 0, below which a unit can be dead.
        tau_eta: age, at least 0, from which it is, in samples since it last won.
        inherited: samples whose statistics a new key's unit takes over from its neighbour.

    Attributes:
        K: keys, (m, d), float32.
        mu: usage, samples won since the unit was last re-used, (m,); 0 for a unit without a key.
        eta: age, (m,).
        key_counter: samples won in all, (m,).
        scrambling_count: units re-used.
        seen: samples.
        weight: sums of the alphas, (m,), float64.
        gap: mean difference of the squared distances to the second and the first key.
        nearest: mean squared distance to the first key.

    Raises:
        UserError: if an option is out of range.

    Example:
        >>> keys = SettlingKeys(2, 1)
        >>> keys.learn(torch.tensor([[0.0], [1.0], [9.0], [0.0]])).moves  # 1 and 0 are near-duplicates
        [Move(source=1, target=0, share=1.0)]
        >>> keys.K.flatten()
        tensor([0.3333, 9.0000])
    """

    K: Tensor
    mu: Tensor
    eta: Tensor
    key_counter: Tensor
    scrambling_count: Tensor
    seen: Tensor
    weight: Tensor
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
        inherited: float = 0.0,
    ) -> None:
        super().__init__()
        lowest = {"key_mem_units": 1, "delta": 1, "settle": 1, "tau_mu": 0, "tau_eta": 0}
        for (name, least), value in zip(lowest.items(), (key_mem_units, delta, settle, tau_mu, tau_eta), strict=True):
            require(name, value, at_least=least)
        self.delta = min(delta, key_mem_units)
        self.settle, self.tau_mu, self.tau_eta, self.inherited = settle, tau_mu, tau_eta, inherited
        self.register_buffer("K", torch.zeros(key_mem_units, key_size, dtype=torch.float32))
        for name in ("mu", "eta", "key_counter"):
            self.register_buffer(name, torch.zeros(key_mem_units, dtype=torch.long))
        for name in ("scrambling_count", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.register_buffer("weight", torch.zeros(key_mem_units, dtype=torch.float64))
        for name in ("gap", "nearest"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def learn(self, z: Tensor) -> Attracted:
        """Take in samples (b, d), and weigh the units for each as it came."""
        walk = _Walk(self)
        alphas = np.zeros((len(z), len(self.K)), dtype=np.float32)
        for row, sample in enumerate(z.detach().to("cpu", torch.float32).numpy()):
            walk.take(sample, alphas, row)
        walk.write_back(self)
        return Attracted(torch.from_numpy(alphas).to(z.device), walk.moves)

    def attend(self, z: Tensor) -> functional.Attention:
        """The units, and their weights, of samples (b, d), with the keys as they are; needs one sample learnt."""
        origin = self.K[0]
        weights = self.nearness_weights(origin).to(self.K.dtype)
        return self.attend_to_nearest(torch.addmm(weights[-1], z.to(self.K.dtype) - origin, weights[:-1]))

    def nearness_weights(self, origin: Tensor | None = None, length: Tensor | float = 1.0) -> Tensor:
        r"""Weights (d + 1, k) of a linear map that tells how near each of the k keys is, in float64.

        It maps (z - origin) / length, with a 1 at its end, to :math:`\gamma (2 (z - c)^\top (K_j - c) - \|K_j - c\|^2)`
        with c the mean key and :math:`\gamma = 2 / \bar g`, instead of :math:`-\gamma \|z - K_j\|^2`: they differ by a
        number that is the same for all keys, which neither the order nor the softmax sees. With a gap of 0, all keys
        within reach are alike, and :math:`\gamma = 1`.

        Args:
            origin: (d,), by default 0.
            length: above 0.
        """
        keys = self.K[: int((self.mu > 0).sum())].double()  # units get their keys in their order
        keys = (keys if origin is None else keys - origin) / length
        centre = keys.mean(dim=0)
        from_centre = keys - centre
        constants = -2 * from_centre @ centre - from_centre.square().sum(dim=1)
        gamma = self._gamma(float(self.gap / length**2)) or 1.0
        return gamma * torch.cat([2 * from_centre.T, constants.unsqueeze(0)])

    def attend_to_nearest(self, nearness: Tensor) -> functional.Attention:
        """The units, and their weights, of samples by what `nearness_weights` says of them, (b, k)."""
        count = min(self.delta, nearness.shape[1])
        return functional.attend(nearness.unsqueeze(1), count, 1.0 if self.gap > 0 else 0.0)

    @staticmethod
    def _gamma(gap: float) -> float:
        return SHARPNESS / gap if gap > 0 else 0.0


class _Walk:
    """The keys while they see one sample after the other, in NumPy: for one sample, PyTorch's calls take longer than
    what they compute.
    """

    def __init__(self, keys: SettlingKeys) -> None:
        self.delta, self.settle, self.tau_mu, self.tau_eta = keys.delta, keys.settle, keys.tau_mu, keys.tau_eta
        self.inherited = keys.inherited
        self.K: NDArray[np.float32] = keys.K.cpu().numpy().copy()
        counters = (keys.mu, keys.eta, keys.key_counter)
        self.mu, self.eta, self.wins = (counter.cpu().numpy().copy() for counter in counters)
        self.seen, self.recycled = int(keys.seen), int(keys.scrambling_count)
        self.gap, self.nearest = float(keys.gap), float(keys.nearest)
        self.used = int((self.mu > 0).sum())
        self.weight: NDArray[np.float64] = keys.weight.cpu().numpy().copy()
        self.moves: list[Move] = []
        self._between_keys()

    def write_back(self, keys: SettlingKeys) -> None:
        """Store the keys and counters."""
        counters = {"K": self.K, "mu": self.mu, "eta": self.eta, "key_counter": self.wins, "weight": self.weight}
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
                winner, self.used = self.used, self.used + 1
                squared = self._place(winner, z, squared, alphas[:row])
        else:
            unit = self._unit_to_reuse(float(squared[winner]))
            if unit is not None:
                self._hand_over(unit, alphas[:row])
                squared = self._place(unit, z, self._squared_distances(z), alphas[:row])
                winner = unit
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
        difference = (self.K[: self.used] - z).astype(np.float64)  # whose squares float32 may not hold
        squared: NDArray[np.float64] = np.einsum("md,md->m", difference, difference)
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
        self.weight[units[:count]] += weights

    def _place(
        self, unit: int, z: NDArray[np.float32], squared: NDArray[np.float64], alphas: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Give a unit the sample as its key; the squared distances to all keys, (used,), with it."""
        squared = np.append(squared, 0.0) if unit == len(squared) else squared
        if len(squared) > 1 and self.inherited:
            squared[unit] = np.inf
            parent = int(squared.argmin())
            has = float(self.weight[parent])
            self._move(Move(parent, unit, min(0.5, self.inherited / has)), alphas)
        squared[unit] = 0.0
        self.K[unit] = z
        self.mu[unit] = self.eta[unit] = 0
        self._refresh(unit)
        return squared

    def _move(self, move: Move, alphas: NDArray[np.float32]) -> None:
        for had in (alphas.T, self.weight):
            had[move.target] += move.share * had[move.source]
            had[move.source] *= 1 - move.share
        self.moves.append(move)

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
        self._move(Move(unit, heir, 1.0), alphas)
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
