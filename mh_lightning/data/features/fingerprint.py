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
from mh_lightning.data.features.file_digests import digests_of_files
from mh_lightning.data.images import ImageReading
from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.perturbations import Perturbation


def image_digests(
    samples: Labelled,
    perturbations: Sequence[Perturbation] = (),
    perturbation_seed: Sequence[int] = (0,),
    digests_of_files: Callable[[Sequence[str], ImageReading], list[bytes]] = digests_of_files,
) -> list[bytes]:
    """Digests of images by their content, not their names: files by their bytes and how they are read, tensors by shape
    and values. Perturbed images are told apart by what perturbs them.

    Args:
        samples: images.
        perturbations: of them.
        perturbation_seed: of what perturbations draw.
        digests_of_files: of paths; by default each file is read.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> one, same, other = image_digests(Labelled(torch.cat([image, image, image + 1]), np.zeros(3, dtype=int)))
        >>> one == same, one == other
        (True, False)
    """

    def digests_of(images: Sequence[Any] | Tensor) -> list[bytes]:
        if len(images) and isinstance(images[0], str):
            return digests_of_files([str(path) for path in images], samples.reading)
        return [_digest_of_pixels(image) for image in images]

    if not isinstance(samples.inputs, Rows):
        return digests_of(samples.inputs)
    rows = samples.inputs.rows
    seen = np.unique(rows).tolist()
    sources = dict(zip(seen, digests_of([samples.inputs.source[row] for row in seen]), strict=True))
    if not perturbations:
        return [sources[row] for row in rows.tolist()]
    kinds = [json.dumps(described(**{"data.perturbations": kind})).encode() for kind in perturbations]
    return [
        digest_bytes(sources[row], kinds[domain], json.dumps([*perturbation_seed, domain, row]).encode())
        for row, domain in zip(rows.tolist(), samples.domain_of_sample.tolist(), strict=True)
    ]


def _digest_of_pixels(image: Tensor) -> bytes:
    pixels = image.contiguous().numpy()
    return digest_bytes(repr(pixels.shape).encode(), pixels)


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
