"""Samples of a stream within a number of bytes: all of them, in fewer bits when they become many, then some."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from mh_lightning.errors import UserError
from mh_lightning.functional.codes import ROUNDED, bytes_of_code, decode, encode
from mh_lightning.functional.kernel_ridge import neighbourhood

BYTES_OF_LABEL = 4
BYTES_OF_LENGTH = 2
MOST_ROUNDING = 0.1  # of the squared distance to neighbours
DRAWS = 4  # of a step of Philox


class SampleStore(nn.Module):
    """Vectors with their classes, in codes (`mh_lightning.functional.codes`).

    They are kept in the most bits that let all be kept. When they become too many for that, they are coded again in
    fewer: their difference from the mean of those that are kept then, as a length and a rounded direction, so that what
    all samples share costs no digits of what tells them apart. When there are no fewer, each sample of the stream is as
    likely to be kept as any other: reservoir sampling, by draws that follow from the seed and a sample's place in the
    stream.

    Source: Vitter, "Random Sampling with a Reservoir", ACM Transactions on Mathematical Software 11, 1985, algorithm R.

    Args:
        num_features: n.
        num_bytes: for all of it, at least those of one sample in the fewest bits.
        bits: of a number that may be used, from the most to the fewest.

    Attributes:
        pool: codes, one after the other, uint8.
        lengths: of differences from the origin, float16, one for each that the fewest bits let be kept.
        origin: that rounded codes are differences from, (n,), float32.
        labels: classes, int32, one for each that the fewest bits let be kept.
        seen: samples of the stream.
        bits: that are used now.
    """

    pool: Tensor
    labels: Tensor
    lengths: Tensor
    origin: Tensor
    seen: Tensor
    bits: Tensor

    def __init__(self, num_features: int, num_bytes: int, bits: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features, self.choices = num_features, bits
        rounds = bits[-1] in ROUNDED
        left = num_bytes - bytes_of_origin(num_features, bits[-1])
        most = left // bytes_of_sample(num_features, bits[-1])
        self.register_buffer("labels", torch.zeros(most, dtype=torch.int32))
        self.register_buffer("lengths", torch.zeros(most * rounds, dtype=torch.float16))
        self.register_buffer("origin", torch.zeros(num_features * rounds, dtype=torch.float32))
        left -= self.labels.nbytes + self.lengths.nbytes
        self.register_buffer("pool", torch.zeros(left, dtype=torch.uint8))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("bits", torch.tensor(bits[0]))

    def capacity(self, bits: int) -> int:
        """Samples that can be kept in so many bits a number."""
        return min(len(self.pool) // bytes_of_code(self.num_features, bits), len(self.labels))

    @property
    def rounds(self) -> bool:
        """Whether codes are of fewer bits than float16 has."""
        return int(self.bits) in ROUNDED

    def __len__(self) -> int:
        return min(int(self.seen), self.capacity(int(self.bits)))

    def add(self, z: Tensor, targets: Tensor, seed: int) -> None:
        """Keep vectors (b, n) of classes (b,), or some of them."""
        while len(z):
            bits = int(self.bits)
            free = self.capacity(bits) - len(self)
            if not free and bits != self.choices[-1]:
                self._use(self.choices[self.choices.index(bits) + 1])
                continue
            if free:
                now = min(free, len(z))
                places = torch.arange(len(self), len(self) + now, device=z.device)
                rows = torch.arange(now, device=z.device)
            else:
                now = len(z)
                kept = draw_places(seed, int(self.seen), now, self.capacity(bits))
                places, rows = (torch.from_numpy(part).to(z.device) for part in kept)
            self._write(places, z[rows])
            self.labels[places] = targets[rows].int()
            self.seen += now
            z, targets = z[now:], targets[now:]

    def check(self, num_classes: int) -> None:
        """See that a state which was loaded can be one of a store.

        Raises:
            UserError: otherwise.
        """
        sound = int(self.bits) in self.choices and int(self.seen) >= 0
        labels = self.labels[: len(self)] if sound else self.labels
        if not sound or bool(((labels < 0) | (labels >= num_classes)).any()):
            raise UserError("The state of the samples that the head keeps is damaged; load another one.")

    def kept(self) -> tuple[Tensor, Tensor]:
        """Vectors (N, n), in float64, and their classes (N,)."""
        bits, count = int(self.bits), len(self)
        z = decode(self._codes(bits)[:count], bits, self.num_features)
        if self.rounds:
            z = self.origin + z * self.lengths[:count].double().unsqueeze(1)
        return z, self.labels[:count].long()

    def resized(self, num_bytes: int, seed: int) -> "SampleStore":
        """The same samples within fewer bytes: in fewer bits, and if that is not enough, some, each as likely as any.

        Args:
            num_bytes: at most as many as now.
            seed: of the draw.
        """
        other = SampleStore(self.num_features, num_bytes, self.choices).to(self.pool.device)
        bits = int(self.bits)
        while len(self) > other.capacity(bits) and bits != self.choices[-1]:
            bits = self.choices[self.choices.index(bits) + 1]
        kept = torch.arange(len(self))
        if len(self) > other.capacity(bits):
            shuffled = torch.randperm(len(self), generator=torch.Generator("cpu").manual_seed(seed))
            kept = shuffled[: other.capacity(bits)].sort().values
        kept = kept.to(self.pool.device)
        other.bits.fill_(bits)
        other.seen.copy_(self.seen)
        other.labels[: len(kept)] = self.labels[kept]
        if bits != int(self.bits):
            other._recode(self.kept()[0][kept])
            return other
        other.origin.copy_(self.origin)
        other._codes(bits)[: len(kept)] = self._codes(bits)[kept]
        if self.rounds:
            other.lengths[: len(kept)] = self.lengths[kept]
        return other

    def _write(self, places: Tensor, z: Tensor) -> None:
        """Code vectors (b, n) into places (b,)."""
        bits = int(self.bits)
        if self.rounds:
            z = z - self.origin
            lengths = torch.linalg.vector_norm(z, dim=1)
            self.lengths[places] = lengths.half()
            z = z / lengths.clamp_min(torch.finfo(z.dtype).tiny).unsqueeze(1)
        self._codes(bits)[places] = encode(z, bits)

    def _codes(self, bits: int) -> Tensor:
        """The pool as codes, (capacity, bytes)."""
        size, rows = bytes_of_code(self.num_features, bits), self.capacity(bits)
        return self.pool[: size * rows].view(rows, size)

    def _use(self, bits: int) -> None:
        """Code what is kept again, in fewer bits."""
        z, _ = self.kept()
        self.bits.fill_(bits)
        self._recode(z)

    def _recode(self, z: Tensor) -> None:
        """Code all that is kept, (N, n), from its mean on."""
        bits = int(self.bits)
        self.origin.copy_(z.mean(dim=0))
        self._write(torch.arange(len(z), device=z.device), z)
        rounding = float((z - self.kept()[0]).square().sum(dim=1).mean())
        apart = neighbourhood(z)
        if rounding > MOST_ROUNDING * apart:
            warnings.warn(
                f"max_bytes: {len(z)} samples do not fit in more than {bits} bits a number, whose rounding (squared, "
                f"{rounding:.1e}) hides what tells neighbours apart ({apart:.1e}); give more max_bytes.",
                stacklevel=2,
            )


def bytes_of_origin(num_features: int, bits: int) -> int:
    """Bytes of the vector (n,) that rounded codes are differences from; 0 where the fewest bits do not round."""
    return 4 * num_features * (bits in ROUNDED)


def bytes_of_sample(num_features: int, bits: int) -> int:
    """Bytes of one vector with its class, and its length where it is rounded.

    Example:
        >>> bytes_of_sample(1280, 16), bytes_of_sample(1280, 4)
        (2564, 646)
    """
    return bytes_of_code(num_features, bits) + BYTES_OF_LABEL + BYTES_OF_LENGTH * (bits in ROUNDED)


def draw_places(seed: int, first: int, samples: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples replace which, one after the other: places in the store, and rows of the samples.

    Args:
        seed: of the draws, of which each sample has one, by its place in the stream.
        first: place of the first sample in the stream, `capacity` at least.
        samples: how many.
        capacity: of the store.

    Example:
        >>> places, rows = draw_places(0, 1000, 1000, 100)
        >>> len(places) == len(set(places.tolist())), bool((places < 100).all()), len(rows) < 100
        (True, True, True)
    """
    skipped = first // DRAWS * DRAWS
    raw = np.random.Philox(key=seed).advance(skipped // DRAWS).random_raw(first - skipped + samples)
    drawn = raw[first - skipped :] % np.arange(first + 1, first + samples + 1, dtype=np.uint64)
    rows = np.flatnonzero(drawn < capacity)
    places, last = np.unique(drawn[rows][::-1].astype(np.int64), return_index=True)  # the last one stays
    return places, rows[::-1][last].astype(np.int64)
