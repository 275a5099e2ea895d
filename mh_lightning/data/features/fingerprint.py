"""What features depend on, as short digests: the content of images, and of the backbone that sees them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mh_lightning.backbones import Backbone
from mh_lightning.backbones.base import mode_of
from mh_lightning.compat.torch_names import hooks_of_all_modules
from mh_lightning.data.features.description import ATOMS, described
from mh_lightning.data.features.digest import digest, digest_bytes
from mh_lightning.data.images import ImageReading
from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.errors import UserError


def image_digests(
    samples: Labelled, perturbations: Sequence[Perturbation] = (), perturbation_seed: Sequence[int] = (0,)
) -> list[bytes]:
    """Digests of images by their content, not their names: files by their bytes and how they are read, tensors by shape
    and values. Perturbed images are told apart by what perturbs them.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> one, same, other = image_digests(Labelled(torch.cat([image, image, image + 1]), np.zeros(3, dtype=int)))
        >>> one == same, one == other
        (True, False)
    """
    if not isinstance(samples.inputs, Rows):
        return [_image_digest(entry, samples.reading) for entry in samples.inputs]
    rows = samples.inputs.rows
    sources = {row: _image_digest(samples.inputs.source[row], samples.reading) for row in np.unique(rows).tolist()}
    if not perturbations:
        return [sources[row] for row in rows.tolist()]
    kinds = [json.dumps(described(**{"data.perturbations": kind})).encode() for kind in perturbations]
    return [
        digest_bytes(sources[row], kinds[domain], json.dumps([*perturbation_seed, domain, row]).encode())
        for row, domain in zip(rows.tolist(), samples.domain_of_sample.tolist(), strict=True)
    ]


def _image_digest(image: str | Tensor, reading: ImageReading) -> bytes:
    if isinstance(image, Tensor):
        pixels = image.contiguous().numpy()
        return digest_bytes(repr(pixels.shape).encode(), pixels)
    try:
        with open(image, "rb") as file:
            return digest_bytes(repr(reading).encode(), file.read())
    except OSError as error:
        raise UserError(f"data: image {image!r} cannot be read ({error}); mend or remove it.") from error


def description_of(backbone: Backbone, transform: Callable[[Any], Tensor] | None) -> dict[str, Any]:
    """All that features depend on besides the image, in plain values.

    Raises:
        UserError: if something of it cannot be told apart from others.
    """
    with mode_of(backbone, training=False):  # in which features are extracted
        nodes = described(
            **{
                "model.init_args.backbone": [backbone, backbone.settings()],
                "model.init_args.backbone's transform": transform,
                "torch's hooks of all modules": hooks_of_all_modules(),
            }
        )
    shown = {name: value if isinstance(value, ATOMS) else str(value) for name, value in backbone.settings().items()}
    return {
        "backbone": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "settings": shown,
        "everything": digest(json.dumps(nodes).encode()),
    }


def fingerprint(description: dict[str, Any]) -> str:
    """Hexadecimal digest of a description."""
    return digest(json.dumps(description, sort_keys=True).encode())


def view_seeds(digest: bytes, views: int) -> NDArray[np.int64]:
    """Seeds (views,) of the random transforms of an image."""
    return np.random.SeedSequence(list(digest)).generate_state(views).astype(np.int64)
