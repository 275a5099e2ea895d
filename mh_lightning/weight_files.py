"""Files of published weights: what is read from them, and whether it is all that a timm model needs."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from mh_lightning.errors import UNREADABLE, UserError, reason_of

# above the values that models start from, and exact in float32 with some thousand tensors
FIRST_MARK = 1000

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGERS)

# the trained encoder of a momentum-contrast file, versions 3 and before, among its copy, predictor and queue of keys
MOCO_ENCODERS = ("base_encoder.", "encoder_q.")
MOCO_PROJECTORS = ("head.", "fc.")  # in place of the classifier, of a ViT and a ResNet


def load_model(name: str, checkpoint_path: str, map_by_order: bool, options: dict[str, Any]) -> Any:
    """A timm model with a file's weights.

    Args:
        name: of the model, one that timm knows.
        checkpoint_path: of the file; see `mh_lightning.backbones.TimmBackbone`.
        map_by_order: give the file's tensors to the model in their order.
        options: for `timm.create_model`; without a classifier.

    Raises:
        UserError: if the file is missing, damaged, or of another architecture.
    """
    path = _resolve(checkpoint_path)
    whole = timm.create_model(name, pretrained=False).state_dict()
    weights = _read_weights(path)
    unfit = f"backbone.checkpoint_path={str(path)!r} does not fit {name!r}"
    advice = "give the file of this model, or map_by_order=true if only the names differ"

    def load(**source: Any) -> Any:
        try:
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)
        except (RuntimeError, LookupError, ValueError, AttributeError) as error:
            raise UserError(f"{unfit}: {reason_of(error)}; {advice}.") from error

    if map_by_order:
        weights = _map_by_order(weights, whole, path, name)
    elif path.suffix == ".npz" and not whole.keys() & weights.keys():
        model = load(file=str(path), custom_load=True)  # the model family's own layout, read without pickle
        blocks = {part for key in weights for part in key.split("/") if part.startswith("encoderblock_")}
        if blocks and len(blocks) != len(model.blocks):  # timm takes the first ones of a deeper model
            raise UserError(f"{unfit}: it has {len(blocks)} blocks, the model {len(model.blocks)}; {advice}.")
        return model
    # timm names each tensor that it does not use; one sentence is enough
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    # without its classifier timm loads what it finds: numbers in place of the weights tell what went where
    marks = {key: torch.full_like(value, FIRST_MARK + place, dtype=torch.promote_types(value.dtype, torch.int32))
             for place, (key, value) in enumerate(weights.items())}  # fmt: skip
    marked = load(state_dict=marks, custom_load=False).state_dict()
    found = {key: int(value.flatten()[0].round()) - FIRST_MARK for key, value in marked.items() if value.numel()}
    missing = [key for key, place in found.items()
               if place not in range(len(weights)) and not key.endswith("num_batches_tracked")]  # fmt: skip
    if missing:
        raise UserError(f"{unfit}: it lacks {len(missing)} of the model's tensors, {missing[0]!r} first; {advice}.")
    classifier = whole.keys() - marked.keys()
    unused = [key for place, key in enumerate(weights) if place not in found.values() and key not in classifier]
    if len(unused) > len(weights) / 10:  # timm drops a few on purpose, but not a larger model's
        raise UserError(f"{unfit}: the model has no place for {len(unused)} of its tensors, {unused[0]!r} first; "
                        f"{advice}.")  # fmt: skip
    model = load(state_dict=weights, custom_load=False)
    given = list(weights.values())
    for key, value in model.state_dict().items():
        place = found.get(key, -1)
        if value.is_floating_point() and place in range(len(given)) and not given[place].is_floating_point():
            raise UserError(f"{unfit}: {key!r} would come from integers, {given[place].dtype}; {advice}.")
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _resolve(checkpoint_path: str) -> Path:
    path = Path(checkpoint_path).expanduser()
    if checkpoint_path.startswith("package://"):
        package, _, file = checkpoint_path.removeprefix("package://").partition("/")
        try:
            spec = importlib.util.find_spec(package) if package else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"backbone.checkpoint_path={checkpoint_path!r} needs the Python package {package!r}, which "
                "is not installed."
            )
        path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(
            f"backbone.checkpoint_path={checkpoint_path!r} is no file; give a .pth, .safetensors or .npz weights file."
        )
    return path


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                weights = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        else:
            weights = timm.models.load_state_dict(str(path), weights_only=True)
        tensors_only = all(isinstance(value, Tensor) for value in weights.values())
    except UNREADABLE as error:
        raise UserError(
            f"backbone.checkpoint_path={str(path)!r} is no readable weights file ({reason_of(error)}); "
            "it may be damaged, or hold more than tensors."
        ) from error
    if not tensors_only or not weights:
        raise UserError(f"backbone.checkpoint_path={str(path)!r} holds something other than named tensors.")
    weights = _encoder_of(weights)
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_meta or value.dtype not in REAL:
            raise UserError(
                f"backbone.checkpoint_path={str(path)!r} must hold dense tensors of real numbers; {key!r} is "
                f"{value.layout} of {value.dtype} on {value.device}."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"backbone.checkpoint_path={str(path)!r} holds NaN or infinite values, in {key!r} first.")
    return weights


def _encoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a momentum-contrast file the encoder that features are taken from, of all others everything.

    Source:
        He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; Chen et al., "An
        Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021 (version 3).

    Example:
        >>> one = torch.ones(1)
        >>> list(_encoder_of({"base_encoder.norm.weight": one, "base_encoder.head.0.weight": one, "predictor.0": one}))
        ['norm.weight']
    """
    for prefix in MOCO_ENCODERS:
        encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if encoder:
            return {key: value for key, value in encoder.items() if not key.startswith(MOCO_PROJECTORS)}
    return weights


def _map_by_order(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    if len(state) != len(expected):
        raise UserError(
            f"backbone.map_by_order: {str(path)!r} holds {len(state)} tensors, "
            f"{name!r} {len(expected)}; they must be as many."
        )
    for (key, wanted), (given_key, given) in zip(expected.items(), state.items(), strict=True):
        if wanted.shape != given.shape:
            raise UserError(
                f"backbone.map_by_order: tensor {given_key!r} of {str(path)!r} has shape "
                f"{tuple(given.shape)}, but {key!r} of {name!r}, at its place, {tuple(wanted.shape)}."
            )
    return dict(zip(expected, state.values(), strict=True))
