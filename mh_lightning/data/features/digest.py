"""Short digests of bytes and tensors."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

DIGEST_BYTES = 16


def digest_bytes(*parts: Any) -> bytes:
    """Of the parts one after the other."""
    hasher = hashlib.sha256()  # for which processors have instructions of their own
    for part in parts:
        hasher.update(part)
    return hasher.digest()[:DIGEST_BYTES]


def digest(*parts: Any) -> str:
    """The same in hexadecimal."""
    return digest_bytes(*parts).hex()


def digest_of_tensor(tensor: Tensor) -> str:
    """Of a dense or sparse tensor's values, on any device.

    Raises:
        RuntimeError: if its values are nowhere.
        TypeError: if they are not all that it is.
    """
    if tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise TypeError(f"it is {tensor.qscheme() if tensor.is_quantized else type(tensor)}")
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    plain = dense.cpu().resolve_conj().resolve_neg().contiguous()
    return digest(plain.flatten().view(torch.uint8).numpy().data)
