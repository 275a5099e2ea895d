"""Squared distances of samples and keys as a matrix product, without the digits that it may lose."""

import torch
from torch import Tensor

from mh_lightning.compat.torch_names import is_traced

# numbers in all differences up to which forming them is faster than a product with its check (measured)
DIRECT = {"cpu": 2**15, "cuda": 2**22}
ROUNDING = 8.0  # units in the last place by which a product may be off
LOST = 256.0  # a distance of fewer such errors has lost its digits
AS_FAR = 4.0  # a distance that is a larger part of that to the mean key has lost none


def squared_distances(z: Tensor, keys: Tensor, units: int) -> tuple[Tensor, bool]:
    r"""Squared distances :math:`\|z - K_j\|^2 = \|z\|^2 - 2 z^\top K_j + \|K_j\|^2`, about the mean key.

    Where the mean key is much farther away than the nearest one, as with one far key or with clusters far apart, the
    difference cancels. Samples whose nearest key of a set is not certain, or is too close for its distance to have
    digits left, are computed again in float64, and if that is not enough, from the differences.

    Recorded graphs (torch.compile, torch.export, ...) cannot depend on values, and a GPU would have to be waited for:
    they use float64 for all samples.

    Args:
        z: samples, (b, d).
        keys: (q * m, d).
        units: m.

    Returns:
        Squared distances (b, q * m), slightly negative at worst, and whether z's precision is enough for a gradient: it
        is where samples lie on a key, as they do on those that they have become, but not where all keys of a set near a
        sample are much nearer to it than the mean key.

    Example:
        >>> keys = torch.tensor([[0.25], [0.5], [1e6]])
        >>> squared_distances(torch.tensor([[0.375 + 1 / 64]]), keys, units=3)[0].argmin(1)
        tensor([1])
    """
    if not is_traced(z) and len(z) * keys.numel() <= DIRECT.get(z.device.type, DIRECT["cuda"]):
        return _from_differences(z, keys), True
    if is_traced(z) or z.device.type != "cpu":
        wide = z.dtype if z.device.type == "mps" else torch.float64
        return _expanded(z.to(wide), keys.to(wide))[0].to(z.dtype), True
    squared, norms = _expanded(z, keys)
    lost = _lost_digits(squared.view(len(z), -1, units), norms)
    if lost is None:
        return squared, True
    if z.dtype == torch.float64:
        again = _from_differences(z[lost], keys)
    else:
        again = squared_distances(z[lost].double(), keys.double(), units)[0].to(z.dtype)
    others = squared.view(len(z), -1, units).kthvalue(min(2, units), dim=2).values
    enough = bool((others * AS_FAR > norms).all())
    squared[lost] = again
    return squared, enough


def _expanded(z: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances, and those of the samples (b, 1) to the mean key."""
    centre = keys.mean(dim=0)
    z, keys = z - centre, keys - centre
    norms = z.square().sum(1, keepdim=True)
    return torch.addmm(keys.square().sum(1), z, keys.t(), alpha=-2) + norms, norms


def _lost_digits(squared: Tensor, norms: Tensor) -> Tensor | None:
    """The samples (b,) whose squared distances (b, q, m) do not tell which key of a set is nearest, or how near."""
    if bool((squared.amin(dim=2) * AS_FAR > norms).all()):
        return None
    nearest, *second = squared.topk(min(2, squared.shape[2]), dim=2, largest=False).values.unbind(2)
    digits = nearest / LOST
    if second:
        digits = torch.minimum(second[0] - nearest, digits)
    error = (nearest + norms) * (ROUNDING * torch.finfo(squared.dtype).eps)
    # NaN, as from squares that overflow, is not certain
    certain = ((digits > error) | (nearest * AS_FAR > norms)).all(dim=1)
    return None if bool(certain.all()) else ~certain


def _from_differences(z: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(z, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
