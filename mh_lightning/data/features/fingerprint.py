"""What features depend on, as short digests: the content of images, and of the backbone that sees them."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mh_lightning.backbones import Backbone
from mh_lightning.data.images import ImageReading
from mh_lightning.data.labelled import Labelled, Rows
from mh_lightning.data.perturbations import Perturbation
from mh_lightning.errors import UserError

DIGEST_BYTES = 16
OF_MODULES = tuple(vars(nn.Module()))  # what torch keeps in every module


def _digest(*parts: Any) -> bytes:
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def image_digests(
    samples: Labelled, perturbations: Sequence[Perturbation] = (), perturbation_seed: Sequence[int] = (0,)
) -> list[bytes]:
    """Digests of images by their content, not their names: files by their bytes and how they are read, tensors by shape
    and values. Perturbed images are told apart by what perturbs them.

    Example:
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
    kinds = [json.dumps(told(perturbation, "data.perturbations")).encode() for perturbation in perturbations]
    return [
        _digest(sources[row], kinds[domain], json.dumps([*perturbation_seed, domain, row]).encode())
        for row, domain in zip(rows.tolist(), samples.domain_of_sample.tolist(), strict=True)
    ]


def _image_digest(image: str | Tensor, reading: ImageReading) -> bytes:
    if isinstance(image, Tensor):
        pixels = image.contiguous().numpy()
        return _digest(repr(pixels.shape).encode(), pixels)
    try:
        with open(image, "rb") as file:
            return _digest(repr(reading).encode(), file.read())
    except OSError as error:
        raise UserError(f"data: image {image!r} cannot be read ({error}); mend or remove it.") from error


def weights_digest(module: nn.Module) -> str:
    """Hexadecimal digest of all parameters and buffers, those that are not saved included: names, types, shapes and
    values.
    """
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(_bytes_of(value))
    return hasher.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    dense = tensor.detach().cpu().to_dense() if tensor.layout != torch.strided else tensor.detach().cpu()
    return dense.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def description_of(backbone: Backbone, transform: Callable[[Any], Tensor] | None) -> dict[str, Any]:
    """All that features depend on besides the image, in plain values.

    Raises:
        UserError: if a transform cannot be told apart from others.
    """
    attributes = {
        name: {key: value for key, value in vars(module).items() if key != "training" and _is_plain(value)}
        for name, module in backbone.named_modules()
    }
    return {
        "backbone": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "settings": told(backbone.settings(), "model.init_args.backbone"),
        "modules": _digest(json.dumps([repr(backbone), told(attributes, "model.init_args.backbone")]).encode()).hex(),
        "weights": weights_digest(backbone),
        "transform": " ".join(repr(transform).split()),
        "transform_settings": _digest(
            json.dumps(told(transform, "model.init_args.backbone's transform")).encode()
        ).hex(),
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor | np.ndarray)


def told(value: Any, whose: str) -> Any:
    """What an object does, in values that JSON takes: its class and attributes, and those of what it holds.

    Args:
        value: numbers, texts, tensors, modules, functions of a module, and objects made of these.
        whose: named if it cannot be told.

    Raises:
        UserError: if something in it has no name or no attributes, such as a lambda.

    Example:
        >>> told({"scale": (1, 0.5), "act": torch.relu}, "x") == told({"scale": (1, 0.5), "act": torch.tanh}, "x")
        False
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), _digest(_bytes_of(value)).hex()]
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), list(value.shape), _digest(value.tobytes()).hex()]
    if isinstance(value, list | tuple):
        return [told(part, whose) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(told(part, whose)) for part in value)
    if isinstance(value, dict):
        return {str(key): told(part, whose) for key, part in value.items()}
    if isinstance(value, Enum | torch.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, partial):
        return [told(value.func, whose), told(value.args, whose), told(value.keywords, whose)]
    if inspect.isroutine(value) or isinstance(value, type):
        if "<" in value.__qualname__:  # <lambda>, <locals>
            raise UserError(
                f"data.feature_cache: {whose} holds {value.__qualname__}, which cannot be told apart from others; give "
                "it a name of its own, as a function or a class of a module."
            )
        bound_to = told(value.__self__, whose) if inspect.ismethod(value) else None
        return [str(value.__module__), value.__qualname__, bound_to]
    if not hasattr(value, "__dict__"):
        raise UserError(
            f"data.feature_cache: {whose} holds a {type(value).__name__}, which cannot be told apart from others; keep "
            "numbers, texts or tensors in its place."
        )
    name, parts = f"{type(value).__module__}.{type(value).__qualname__}", vars(value)
    if isinstance(value, nn.Module):
        parts = {key: part for key, part in parts.items() if key not in OF_MODULES}
        parts |= {"children": dict(value.named_children()), "weights": weights_digest(value)}
    return [name, told(parts, whose)]


def fingerprint(description: dict[str, Any]) -> str:
    """Hexadecimal digest of a description."""
    return _digest(json.dumps(description, sort_keys=True).encode()).hex()


def view_seeds(digest: bytes, views: int) -> NDArray[np.int64]:
    """Seeds (views,) of the random transforms of an image."""
    return np.random.SeedSequence(list(digest)).generate_state(views).astype(np.int64)
