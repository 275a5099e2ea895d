"""Backbones: modules that turn inputs into feature vectors, with the transforms that their inputs need."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.errors import UserError, reason_of
from mh_lightning.weight_files import load_model


class ImageFormat(NamedTuple):
    """What images a backbone takes: squares of `size` pixels, minus `mean` and over `std`, each a number a channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone(nn.Module):
    """Maps a batch of inputs to features (b, num_features). Subclasses set `num_features` and define `forward`."""

    num_features: int

    def transform(self, augment: bool) -> Callable[[Any], Tensor] | None:
        """What a data set applies to one PIL image, or None if inputs need nothing.

        Args:
            augment: the random transform of training instead of the fixed one of evaluation.
        """
        return None

    def image_format(self) -> ImageFormat | None:
        """The images that it takes, or None if it takes something else."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values that its features depend on besides its modules and weights."""
        return {}


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
        _check_name(name)
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
            self.model.to(memory_format=torch.channels_last)
            self.requires_grad_(False)
            self.train(False)
        if image_size is not None:
            self._try(image_size)

    def _try(self, image_size: int) -> None:
        training = self.training
        try:
            with torch.no_grad():
                self.eval()(torch.zeros(1, *self._data_config["input_size"]))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"backbone.image_size={image_size} does not suit {self.name!r}: {reason_of(error)}."
            ) from error
        self.train(training)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the training mode; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, channels, height, width) to features (b, num_features)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.frozen:
                x = x.contiguous(memory_format=torch.channels_last)  # as the weights are, which is faster
            features: Tensor = self.model(x)
            return F.normalize(features, dim=1) if self.normalize_features else features

    def settings(self) -> dict[str, Any]:
        """The model's name, its image size and whether features are normalised."""
        size: tuple[int, ...] = self._data_config["input_size"]
        return {"name": self.name, "image_size": size[-1], "normalize_features": self.normalize_features}

    def image_format(self) -> ImageFormat:
        """The model's input size, mean and standard deviation, from timm's data configuration."""
        config = self._data_config
        return ImageFormat(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))

    def transform(self, augment: bool) -> Callable[[Any], Tensor]:
        """The model's own transform of a PIL image, from timm's data configuration."""
        transform: Callable[[Any], Tensor] = timm.data.create_transform(**self._data_config, is_training=augment)
        return transform


def _check_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if name.startswith("hf-hub:"):
        return
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3) or ["timm.list_models() lists them"]
        raise UserError(f"backbone.name={name!r} is no model that timm knows; close names: {', '.join(close)}.")
    if name != architecture and name not in timm.list_pretrained(f"{architecture}.*"):
        raise UserError(f"backbone.name={name!r}: timm knows the model {architecture!r}, but no such weights of it.")


def _create_model(
    name: str, pretrained: bool, checkpoint_path: str | None, map_by_order: bool, image_size: int | None
) -> Any:
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = image_size
    if checkpoint_path is not None:
        with torch.random.fork_rng(devices=[]):  # a seed gives the same head, whatever the loading draws
            return load_model(name, checkpoint_path, map_by_order, options)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not (pretrained or name.startswith("hf-hub:")):
            raise
        option = "backbone.pretrained=true" if pretrained else f"backbone.name={name!r}"
        raise UserError(
            f"{option}: timm could not get the weights of {name!r} "
            f"({reason_of(error)}); without a network, give checkpoint_path."
        ) from error
