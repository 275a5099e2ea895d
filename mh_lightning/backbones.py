"""Backbones: modules that turn inputs into feature vectors, with the transforms that their inputs need."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import timm.data
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mh_lightning.errors import UserError, reason_of
from mh_lightning.weight_files import load_model


class ImageFormat(NamedTuple):
    """What images a backbone takes: squares of `size` pixels, minus `mean` and over `std`, each a number a channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike.

    Attributes:
        parameters: that are trained.
        learning_rate_factor: what the optimizer's learning rate is multiplied by for them.
        weight_decay: theirs, by default the optimizer's.
    """

    parameters: list[nn.Parameter]
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


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

    def parameter_groups(self) -> list[ParameterGroup]:
        """All its trainable parameters, each once, by how the optimizer treats them."""
        return [ParameterGroup([parameter for parameter in self.parameters() if parameter.requires_grad])]

    def optimizer_settings(self) -> dict[str, Any]:
        """Options, other than their defaults, that `parameter_groups` follows from; a run is resumed with the same."""
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


@dataclass(frozen=True)
class _TrainingOptions:
    """Options of `TimmBackbone` on how it is trained and run, which its features do not depend on."""

    learning_rate_factor: float
    weight_decay: float | None
    layer_decay: float | None
    frozen_batch_norm: bool
    compile: bool

    def optimizer_settings(self) -> dict[str, Any]:
        options = {
            "learning_rate_factor": None if self.learning_rate_factor == 1 else self.learning_rate_factor,
            "weight_decay": self.weight_decay,
            "layer_decay": self.layer_decay,
        }
        return {name: value for name, value in options.items() if value is not None}

    def check(self, frozen: bool) -> None:
        given = self.optimizer_settings()
        for name in ("learning_rate_factor", "weight_decay"):
            if name in given and not 0 <= given[name] < math.inf:
                raise UserError(f"backbone.{name} must be a number of at least 0, got {given[name]}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"backbone.layer_decay must lie in (0, 1], got {self.layer_decay}.")
        if frozen and given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"backbone.{name}={value} is for a backbone that is trained, and backbone.frozen=true; set "
                f"frozen=false, or leave {name} out."
            )


class TimmBackbone(Backbone):
    """A timm model without its classifier.

    Args:
        name: any model name that timm knows; `timm.list_models()` lists them.
        pretrained: take timm's own weights (from its cache or the network).
        checkpoint_path: take weights from a local .pth, .safetensors or .npz file instead. ``package://name/file``
            points into an installed Python package. Files are read without running any code in them. Of a
            momentum-contrast file (MoCo), the encoder is taken.
        map_by_order: give the file's tensors to the model in their order, whatever their names. All shapes must fit.
        frozen: no gradient, always in evaluation mode, no graph.
        image_size: side of the square input in pixels, by default the size the model was trained at.
        normalize_features: divide each feature vector by its L2 norm.
        learning_rate_factor: what the optimizer's learning rate is multiplied by for the backbone. A trained backbone
            forgets less at a hundredth of the head's (Zhang et al., "SLCA: Slow Learner with Classifier Alignment for
            Continual Learning on a Pre-trained Model", ICCV 2023).
        weight_decay: of the backbone, by default the optimizer's.
        layer_decay: multiply the backbone's learning rate by this once more for each block, from the output to the
            input, in timm's grouping into blocks.
        frozen_batch_norm: keep the running statistics of a trained backbone's batch-norm layers, and normalise by them
            in training too; their weights and biases still learn.
        compile: run the model through ``torch.compile``, which takes a while at the first batch.

    Raises:
        UserError: on an unknown name, a missing, damaged or unfitting weights file, or options that contradict
            each other.

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
        learning_rate_factor: float = 1.0,
        weight_decay: float | None = None,
        layer_decay: float | None = None,
        frozen_batch_norm: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_name(name)
        self._training_options = _TrainingOptions(
            learning_rate_factor, weight_decay, layer_decay, frozen_batch_norm, compile
        )
        self._training_options.check(frozen)
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
        self.model.to(memory_format=torch.channels_last)  # convolutions are faster so, forward and backward
        if frozen:
            self.requires_grad_(False)
        self.train()
        if image_size is not None:
            self._try(image_size)

    def _try(self, image_size: int) -> None:
        training = self.training
        try:
            with torch.no_grad():
                self.eval().model(torch.zeros(1, *self._data_config["input_size"]))  # not compiled for this one image
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"backbone.image_size={image_size} does not suit {self.name!r}: {reason_of(error)}."
            ) from error
        self.train(training)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the training mode; a frozen backbone, or its frozen batch-norm layers, stay in evaluation mode."""
        super().train(mode and not self.frozen)
        if self._training_options.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, channels, height, width) to features (b, num_features)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = x.contiguous(memory_format=torch.channels_last)  # as the weights are
            features = self._run_compiled(x) if self._training_options.compile else self.model(x)
            return F.normalize(features, dim=1) if self.normalize_features else features

    def _run_compiled(self, x: Tensor) -> Tensor:
        if self.model._compiled_call_impl is None:  # at first, and in copies, which torch makes without it
            self.model.compile()
        try:
            features: Tensor = self.model(x)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise UserError(
                f"backbone.compile=true: torch cannot compile {self.name!r} here ({reason_of(error)}); leave it out."
            ) from error
        return features

    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters, with `layer_decay` by timm's blocks from the output to the input.

        Example:
            >>> backbone = TimmBackbone("test_vit", frozen=False, learning_rate_factor=0.01, layer_decay=0.5)
            >>> [group.learning_rate_factor for group in backbone.parameter_groups()][:4]
            [0.01, 0.005, 0.0025, 0.00125]
        """
        factor, weight_decay = self._training_options.learning_rate_factor, self._training_options.weight_decay
        if self._training_options.layer_decay is None:
            (group,) = super().parameter_groups()
            return [ParameterGroup(group.parameters, factor, weight_decay)]
        by_scale: dict[float, list[nn.Parameter]] = {}  # timm splits blocks further, for a weight decay of its own
        for part in timm.optim.param_groups_layer_decay(self.model, layer_decay=self._training_options.layer_decay):
            by_scale.setdefault(part["lr_scale"], []).extend(part["params"])
        return [
            ParameterGroup(by_scale[scale], factor * scale, weight_decay) for scale in sorted(by_scale, reverse=True)
        ]

    def optimizer_settings(self) -> dict[str, Any]:
        """The learning rate's factor, weight decay and layer decay, where they are given."""
        return self._training_options.optimizer_settings()

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
    registered = not name.startswith("hf-hub:")
    if image_size is not None and registered and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
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
