"""Sums of products of features, the upper half of a symmetric matrix in strips of rows."""

import torch
from torch import Tensor, nn

STRIP = 128  # rows: few enough that little below the diagonal is kept, enough for products to be fast


class PackedGram(nn.Module):
    r"""The sum :math:`\sum_i h_i h_i^\top`, of which a strip of rows holds what is right of its first column.

    Half the memory, and half the time to add, of the whole matrix.

    Args:
        size: d.
        dtype: of the sums.

    Attributes:
        strips: one after the other, about d (d + 128) / 2 numbers.

    Example:
        >>> gram = PackedGram(2, torch.float32)
        >>> gram.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> gram.whole()
        tensor([[1., 2.],
                [2., 5.]], dtype=torch.float64)
    """

    strips: Tensor

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("strips", torch.zeros(numbers_of_gram(size), dtype=dtype))

    def _views(self) -> list[tuple[int, Tensor]]:
        """First row of each strip, and the strip: (rows, d - first)."""
        views, at = [], 0
        for first in range(0, self.size, STRIP):
            shape = min(STRIP, self.size - first), self.size - first
            views.append((first, self.strips[at : at + shape[0] * shape[1]].view(shape)))
            at += shape[0] * shape[1]
        return views

    def add(self, features: Tensor) -> None:
        """Add features (b, d)."""
        features = features.to(self.strips.dtype)
        for first, strip in self._views():
            strip.addmm_(features[:, first : first + len(strip)].T, features[:, first:])

    def whole(self) -> Tensor:
        """The matrix (d, d), in float64."""
        whole = self.strips.new_zeros(self.size, self.size, dtype=torch.float64)
        for first, strip in self._views():
            whole[first : first + len(strip), first:] = strip
            whole[first:, first : first + len(strip)] = strip.T
        return whole


def numbers_of_gram(size: int) -> int:
    """Numbers that a Gram matrix (d, d) keeps.

    Example:
        >>> numbers_of_gram(128), numbers_of_gram(5000)
        (16384, 12819520)
    """
    return sum(min(STRIP, size - first) * (size - first) for first in range(0, size, STRIP))
