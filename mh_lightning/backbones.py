"""Backbones: modules that turn inputs into feature vectors, with the transforms that their inputs need."""

import importlib.util
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.errors import UserError


class Backbone(nn.Module):
    """Maps a batch of inputs to features (b, num_features). Subclasses set `num_features` and define `forward`."""

    num_features: int

    def transform(self, augment: bool) -> Callable[[Any], Tensor] | None:
        """What a data set applies to one PIL image, or None if inputs need nothing.

        Args:
            augment: the random transform of training instead of the fixed one of evaluation.
        """
        return None


class Identity(Backbone):
    """Features that are already there: passes (b, num_features) on.

    Args:
        num_features: length of the feature vectors.

    Example:
        >>> Identity(3)(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Pass the features (b, num_features) on, flattened."""
        x = x.flatten(1)
        if x.shape[1] != self.num_features:
            raise UserError(
                f"backbone.num_features is {self.num_features}, but the data has {x.shape[1]} features a "
                f"sample; set it to {x.shape[1]}."
            )
        return x


class TimmBackbone(Backbone):
    """A timm model without its classifier.

    Args:
        name: any model name that timm knows; `timm.list_models()` lists them.
        pretrained: take timm's own weights (from its cache or the network).
        checkpoint_path: take weights from a local .pth, .safetensors or .npz file instead. ``package://name/file``
            points into an installed Python package. Files are read without running any code in them.
        map_by_order: give the file's tensors to the model in their order, whatever their names. All shapes must fit.
        frozen: no gradient, always in evaluation mode, no graph.
        image_size: side of the square input in pixels, by default the size the model was trained at.
        normalize_features: divide each feature vector by its L2 norm.

    Raises:
        UserError: on an unknown name, or a missing, damaged or unfitting weights file.

    Example:
        >>> backbone = TimmBackbone("resnet10t", image_size=64)
        >>> backbone(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        map_by_order: bool = False,
        frozen: bool = True,
        image_size: int | None = None,
        normalize_features: bool = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(name.split(".")[0]) and not name.startswith("hf-hub:"):
            close = timm.list_models(f"*{name.split('.')[0][:6]}*")[:3]
            hint = f" Close names: {', '.join(close)}." if close else " timm.list_models() lists the names."
            raise UserError(f"backbone.name={name!r} is no model that timm knows.{hint}")
        if pretrained and checkpoint_path is not None:
            raise UserError("backbone.pretrained=true and backbone.checkpoint_path exclude each other; give one.")
        if image_size is not None and image_size < 1:
            raise UserError(f"backbone.image_size must be positive, got {image_size}.")
        self.name, self.frozen, self.normalize_features = name, frozen, normalize_features
        model = _create_model(name, pretrained, checkpoint_path, map_by_order, image_size)
        self.model: nn.Module = model
        self.num_features = int(getattr(model, "head_hidden_size", model.num_features))
        self._data_config = timm.data.resolve_model_data_config(self.model)
        if image_size is not None:
            self._data_config["input_size"] = (self._data_config["input_size"][0], image_size, image_size)
        if frozen:
            self.requires_grad_(False)
            self.train(False)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the training mode; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, channels, height, width) to features (b, num_features)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: Tensor = self.model(x)
            return F.normalize(features, dim=1) if self.normalize_features else features

    def transform(self, augment: bool) -> Callable[[Any], Tensor]:
        """The model's own transform of a PIL image, from timm's data configuration."""
        transform: Callable[[Any], Tensor] = timm.data.create_transform(**self._data_config, is_training=augment)
        return transform


def _create_model(
    name: str, pretrained: bool, checkpoint_path: str | None, map_by_order: bool, image_size: int | None
) -> Any:
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = image_size
    if checkpoint_path is None:
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            if not pretrained:
                raise
            raise UserError(
                f"backbone.pretrained=true: timm could not get the weights of {name!r} "
                f"({_first_line(error)}); without a network, give checkpoint_path."
            ) from error
    path = _resolve(checkpoint_path)
    overlay = _weights_overlay(name, path, map_by_order)
    unfit = f"backbone.checkpoint_path={str(path)!r} does not fit {name!r}"
    advice = "give the file of this model, or map_by_order=true if only the names differ"
    models = []
    # timm names every tensor that it does not use; the sentence below is enough
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            try:
                models.append(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options))
            except (RuntimeError, KeyError, ValueError, AttributeError) as error:
                raise UserError(f"{unfit}: {_first_line(error)}; {advice}.") from error
    # without its classifier timm loads what it finds: what still depends on the seed was not in the file
    model, other = models
    missing = [key for key, value in model.state_dict().items() if not torch.equal(value, other.state_dict()[key])]
    if missing:
        raise UserError(f"{unfit}: it lacks {len(missing)} of the model's tensors, {missing[0]!r} first; {advice}.")
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _resolve(checkpoint_path: str) -> Path:
    path = Path(checkpoint_path).expanduser()
    if checkpoint_path.startswith("package://"):
        package, _, file = checkpoint_path.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package) if package else None
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


def _weights_overlay(name: str, path: Path, map_by_order: bool) -> dict[str, Any]:
    """What timm is to load: a state dict, or the path of a file in the model family's own .npz layout."""
    expected = timm.create_model(name, pretrained=False).state_dict()
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                if not map_by_order and not expected.keys() & set(arrays.files):
                    return {"file": str(path), "custom_load": True}
                state = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        else:
            state = timm.models.load_state_dict(str(path), weights_only=True)
        tensors_only = all(isinstance(value, Tensor) for value in state.values())
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        AttributeError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        SafetensorError,
    ) as error:
        raise UserError(
            f"backbone.checkpoint_path={str(path)!r} is no readable weights file ({_first_line(error)}); "
            "it may be damaged, or hold more than tensors."
        ) from error
    if not tensors_only or not state:
        raise UserError(f"backbone.checkpoint_path={str(path)!r} holds something other than named tensors.")
    if map_by_order:
        state = _map_by_order(state, expected, path)
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"backbone.checkpoint_path={str(path)!r} holds NaN or infinite values, in {broken[0]!r} first.")
    return {"state_dict": state, "custom_load": False}


def _map_by_order(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if len(state) != len(expected):
        raise UserError(
            f"backbone.map_by_order: {str(path)!r} holds {len(state)} tensors, the model "
            f"{len(expected)}; they must be as many."
        )
    for (key, wanted), (given_key, given) in zip(expected.items(), state.items(), strict=True):
        if wanted.shape != given.shape:
            raise UserError(
                f"backbone.map_by_order: tensor {given_key!r} of {str(path)!r} has shape "
                f"{tuple(given.shape)}, but {key!r} of the model, at its place, {tuple(wanted.shape)}."
            )
    return dict(zip(expected, state.values(), strict=True))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".:")
