"""Maps from a layer's input to the space of its keys (psi in the paper)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

PSI_NAMES = ("identity", "sign", "resize1d", "resize2d", "resize2d_sign")


def psi(x: Tensor, name: str, key_size: int) -> Tensor:
    """Map inputs to key space.

    Args:
        x: (b, n); for "resize2d" and "resize2d_sign" images, (b, channels, height, width).
        name: "identity", "sign", "resize1d" (linear interpolation), "resize2d" (bilinear, aspect kept, zero padded)
            or "resize2d_sign".
        key_size: d.

    Returns:
        (b, d), not normalised.

    Example:
        >>> psi(torch.tensor([[1.0, -2.0, 3.0, 5.0]]), "resize1d", key_size=2)
        tensor([[-0.5000,  4.0000]])
    """
    if name.startswith("resize2d"):
        mapped = _resize2d(x, key_size)
    elif name == "resize1d" and x.shape[1] != key_size:
        mapped = F.interpolate(x.unsqueeze(1), size=key_size, mode="linear").squeeze(1)
    else:
        mapped = x
    return torch.sign(mapped) if name.endswith("sign") else mapped


def resized_shape(channels: int, height: int, width: int, key_size: int) -> tuple[int, int]:
    r"""Height and width at which an image of the same aspect fits into `key_size` numbers.

    With :math:`s = d // c`: :math:`w' = \mathrm{round}(\sqrt{s / (w h)}\\, w)` and :math:`h' = s // w'`.

    Example:
        >>> resized_shape(3, 32, 32, key_size=200)
        (8, 8)
    """
    area = key_size // channels
    new_width = max(1, round(math.sqrt(area / (width * height)) * width))
    return area // new_width, new_width


def _resize2d(x: Tensor, key_size: int) -> Tensor:
    shape = resized_shape(x.shape[1], x.shape[2], x.shape[3], key_size)
    small = F.interpolate(x, size=shape, mode="bilinear").flatten(1)
    return F.pad(small, (0, key_size - small.shape[1]))
