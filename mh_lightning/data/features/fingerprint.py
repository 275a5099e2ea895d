"""What features depend on, as short digests: the content of images, and of the backbone that sees them."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mh_lightning.backbones import Backbone
from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.errors import UserError

DIGEST_BYTES = 16


def _digest(*parts: Any) -> bytes:
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def image_digests(
    samples: Labelled, perturbations: Sequence[Perturbation] = (), perturbation_seed: Sequence[int] = (0,)
) -> list[bytes]:
    """Digests of images by their content, not their names: files by their bytes, tensors by shape and values.
    Perturbed images are told apart by what perturbs them.

    Example:
        >>> image = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> one, same, other = image_digests(Labelled(torch.cat([image, image, image + 1]), np.zeros(3, dtype=int)))
        >>> one == same, one == other
        (True, False)
    """
    if not isinstance(samples.inputs, Rows):
        return [_image_digest(entry) for entry in samples.inputs]
    rows = samples.inputs.rows
    sources = {row: _image_digest(samples.inputs.source[row]) for row in np.unique(rows).tolist()}
    if not perturbations:
        return [sources[row] for row in rows.tolist()]
    kinds = [repr(perturbation).encode() for perturbation in perturbations]
    return [
        _digest(sources[row], kinds[domain], json.dumps([*perturbation_seed, domain, row]).encode())
        for row, domain in zip(rows.tolist(), samples.domain_of_sample.tolist(), strict=True)
    ]


def _image_digest(image: str | Tensor) -> bytes:
    if isinstance(image, Tensor):
        pixels = image.contiguous().numpy()
        return _digest(repr(pixels.shape).encode(), pixels)
    try:
        with open(image, "rb") as file:
            return _digest(file.read())
    except OSError as error:
        raise UserError(f"data: image {image!r} cannot be read ({error}); mend or remove it.") from error


def weights_digest(module: nn.Module) -> str:
    """Hexadecimal digest of all parameters and buffers: names, types, shapes and values."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in sorted(module.state_dict().items()):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def description_of(backbone: Backbone, transform: Callable[[Any], Tensor] | None) -> dict[str, Any]:
    """All that features depend on besides the image, in plain values.

    Raises:
        UserError: if the transform's representation does not tell its settings.
    """
    told = repr(transform)
    if re.search(r" at 0x[0-9a-f]+>", told):
        raise UserError(
            "data.feature_cache needs a transform whose repr tells its settings, so that another one is told apart; "
            f"model.init_args.backbone gives {told}."
        )
    return {
        "backbone": type(backbone).__name__,
        **backbone.settings(),
        "modules": _digest(repr(backbone).encode()).hex(),
        "weights": weights_digest(backbone),
        "transform": " ".join(told.split()),
    }


def fingerprint(description: dict[str, Any]) -> str:
    """Hexadecimal digest of a description."""
    return _digest(json.dumps(description, sort_keys=True).encode()).hex()


def view_seeds(digest: bytes, views: int) -> NDArray[np.int64]:
    """Seeds (views,) of the random transforms of an image."""
    return np.random.SeedSequence(list(digest)).generate_state(views).astype(np.int64)
