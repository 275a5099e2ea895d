"""Vectors of length 1 in few bits a number: turned at random, so that all numbers are alike, and rounded to levels."""

import math

import torch
from torch import Tensor

FLOAT64, FLOAT16 = 64, 16  # bits of numbers that are stored as they are
ROUNDED = (8, 4)  # bits of numbers that are stored as the nearest of 2^bits levels
STEPS_A_UNIT = 32.0  # of 8 bits: levels up to four standard deviations, of which rounding loses a hundredth
# levels of least squared error for N(0, 1) in 4 bits: Max, "Quantizing for Minimum Distortion", 1960, table I
LEVELS = (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733)


def turn(z: Tensor, signs: Tensor) -> Tensor:
    r"""Vectors times a random orthogonal matrix: signs, and then Hartley's transform, in O(n log n).

    A number of :math:`\sqrt n` times what comes out is close to N(0, 1) for vectors of length 1, whatever they were,
    if n is not small. Lengths, and so distances, stay.

    Args:
        z: (b, n).
        signs: 1 or -1, (n,).

    Example:
        >>> turn(torch.eye(2), torch.tensor([1.0, -1.0]))
        tensor([[ 0.7071,  0.7071],
                [-0.7071,  0.7071]])
    """
    return _hartley(z * signs)


def turn_back(z: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `turn`.

    Example:
        >>> signs = torch.tensor([1.0, -1.0, 1.0])
        >>> turn_back(turn(torch.tensor([[1.0, 2.0, 3.0]]), signs), signs)
        tensor([[1.0000, 2.0000, 3.0000]])
    """
    return _hartley(z) * signs


def _hartley(z: Tensor) -> Tensor:
    transformed: Tensor = torch.fft.fft(z, norm="ortho")
    return transformed.real - transformed.imag


def bytes_of_code(num_features: int, bits: int) -> int:
    """Bytes of one vector.

    Example:
        >>> bytes_of_code(1280, 4), bytes_of_code(3, 4)
        (640, 2)
    """
    return -(-num_features * bits // 8)


def encode(z: Tensor, bits: int) -> Tensor:
    r"""Codes of vectors whose numbers, times :math:`\sqrt n`, are about N(0, 1), or any, in 64 bits.

    Args:
        z: (b, n).
        bits: of a number: 64, 16, 8 or 4.

    Returns:
        (b, bytes), uint8.

    Example:
        >>> codes = encode(torch.tensor([[0.6, -0.8]]), 8)
        >>> codes, decode(codes, 8, 2)
        (tensor([[155,  92]], dtype=torch.uint8), tensor([[ 0.5966, -0.7955]], dtype=torch.float64))
    """
    if bits not in ROUNDED:
        numbers = z.to(torch.float64 if bits == FLOAT64 else torch.float16)
        return numbers.contiguous().view(torch.uint8)
    standard = z * math.sqrt(z.shape[1])
    if bits == 8:
        return ((standard * STEPS_A_UNIT).round().clamp(-128, 127) + 128).to(torch.uint8)
    levels = _levels(standard)
    codes = torch.bucketize(standard, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] << 4 | codes[:, 1::2]


def decode(codes: Tensor, bits: int, num_features: int) -> Tensor:
    """Vectors (b, n), in float64, of codes (b, bytes); see `encode`."""
    if bits not in ROUNDED:
        return codes.contiguous().view(torch.float64 if bits == FLOAT64 else torch.float16).double()
    if bits == 8:
        standard = (codes.double() - 128) / STEPS_A_UNIT
    else:
        both = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)[:, :num_features]
        standard = _levels(codes.new_zeros((), dtype=torch.float64))[both.long()]
    return standard / math.sqrt(num_features)


def _levels(like: Tensor) -> Tensor:
    positive = like.new_tensor(LEVELS)
    return torch.cat([-positive.flip(0), positive])
