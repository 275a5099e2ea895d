"""Models of timm as backbones."""

import difflib
from collections.abc import Callable
from typing import Any

import timm
import timm.data
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.backbones.base import ImageFormat, ParameterGroup
from mh_lightning.backbones.peft import Peft
from mh_lightning.backbones.peft.base import merge
from mh_lightning.backbones.trained import TrainedBackbone, TrainingOptions, WeightSource
from mh_lightning.compat.torch_names import is_compiled
from mh_lightning.errors import UserError, reason_of, require
from mh_lightning.weight_files import load_model


class TimmBackbone(TrainedBackbone):
    """A timm model without its classifier; where it gives a map or tokens, their average over all places.

    Args:
        name: any model name that timm knows; `timm.list_models()` lists them.
        pretrained: take timm's own weights (from its cache or the network).
        checkpoint_path: take weights from a local .pth, .safetensors or .npz file instead. ``package://name/file``
            points into an installed Python package. Files are read without running any code in them. Of a
            momentum-contrast file (MoCo), the encoder is taken.
        map_by_order: give the file's tensors to the model in their order, whatever their names. All shapes must fit.
        frozen: no gradient, always in evaluation mode, no graph; but for what `peft` adds.
        image_size: side of the square input in pixels, at least 1, by default the size the model was trained at.
        normalize_features: divide each feature vector by its L2 norm.
        learning_rate_factor: at least 0, what the optimizer's learning rate is multiplied by for the backbone. A
            trained backbone forgets less at a hundredth of the head's (Zhang et al., "SLCA: Slow Learner with
            Classifier Alignment for Continual Learning on a Pre-trained Model", ICCV 2023).
        weight_decay: at least 0, of the backbone, by default the optimizer's.
        layer_decay: in (0, 1]: multiply the backbone's learning rate by this once more for each block, from the output
            to the input, in timm's grouping into blocks.
        frozen_batch_norm: keep the running statistics of a trained backbone's batch-norm layers, and normalise by them
            in training too; their weights and biases still learn.
        compile: run the model through ``torch.compile``, which takes a while at the first batch.
        in_checkpoints: whether checkpoints hold the weights of a frozen backbone, too, where they come from timm or a
            file; by default they name them by fingerprint, and take them from there again. Other weights are always in
            checkpoints.
        peft: trained parameters beside the frozen ones: `mh_lightning.backbones.LoRA`, `ScaleAndShift`, `Adapters` or
            `VisualPrompts`. Averages of batch-norm layers stay as they are.

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
        in_checkpoints: bool = False,
        peft: Peft | None = None,
    ) -> None:
        _check_name(name)
        if peft is not None and (not frozen or layer_decay is not None):
            option = "layer_decay" if frozen else "frozen=false"
            raise UserError(f"backbone.{option}: backbone.peft trains nothing but what it adds; leave one of them out.")
        frozen_batch_norm = frozen_batch_norm or peft is not None
        super().__init__(
            TrainingOptions(learning_rate_factor, weight_decay, layer_decay, frozen_batch_norm, compile),
            frozen and peft is None,
        )
        if pretrained and checkpoint_path is not None:
            raise UserError("backbone.pretrained=true and backbone.checkpoint_path exclude each other; give one.")
        require("backbone.image_size", image_size, at_least=1)
        self.name, self.normalize_features = name, normalize_features
        self.source = WeightSource(pretrained, checkpoint_path, map_by_order, in_checkpoints)
        model = _create_model(name, pretrained, checkpoint_path, map_by_order, image_size)
        self.model: nn.Module = model
        self.num_features = int(getattr(model, "head_hidden_size", model.num_features))
        self._data_config = timm.data.resolve_model_data_config(self.model)
        if image_size is not None:
            self._data_config["input_size"] = (self._data_config["input_size"][0], image_size, image_size)
        for parameter in self.model.parameters():
            if parameter.dim() == 4:  # convolutions of images are faster so, forward and backward
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.peft = peft
        if self.frozen:
            self.requires_grad_(False)
        self.train()
        if image_size is not None:
            self._try(f"backbone.image_size={image_size}")
        if peft is not None:
            peft.add_to(self.model)
            self._try(f"backbone.peft={type(peft).__name__}")

    def _try(self, option: str) -> None:
        training = self.training
        try:
            with torch.no_grad():
                self.eval().model(torch.zeros(1, *self._data_config["input_size"]))  # not compiled for this one image
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise UserError(f"{option} does not suit {self.name!r}: {reason_of(error)}.") from error
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, channels, height, width) to features (b, num_features)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = x.contiguous(memory_format=torch.channels_last)  # as the weights are
            features = self._run_compiled(x) if self._training_options.compile else self.model(x)
            features = _average_over_places(features, self.num_features)
            return F.normalize(features, dim=1) if self.normalize_features else features

    def _run_compiled(self, x: Tensor) -> Tensor:
        if not is_compiled(self.model):  # at first, and in copies, which torch makes without it
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
        options = self._training_options
        if options.layer_decay is None:
            return super().parameter_groups()
        by_scale: dict[float, list[nn.Parameter]] = {}  # timm splits blocks further, for a weight decay of its own
        for part in timm.optim.param_groups_layer_decay(self.model, layer_decay=options.layer_decay):
            by_scale.setdefault(part["lr_scale"], []).extend(part["params"])
        return [
            ParameterGroup(by_scale[scale], options.learning_rate_factor * scale, options.weight_decay)
            for scale in sorted(by_scale, reverse=True)
        ]

    def finish_training(self) -> None:
        """From now on it is frozen; LoRA, and scales and shifts, become a part of the weights."""
        super().finish_training()
        merge(self.model)
        self.requires_grad_(False)
        if self.peft is not None and self.peft.merges:
            self.peft = None

    def settings(self) -> dict[str, Any]:
        """The model's name, its image size, whether features are normalised, and what is added."""
        size: tuple[int, ...] = self._data_config["input_size"]
        added = {} if self.peft is None else {"peft": str(self.peft)}
        return {"name": self.name, "image_size": size[-1], "normalize_features": self.normalize_features, **added}

    def arguments(self) -> dict[str, Any]:
        """Those that features follow from, and where the weights come from."""
        added = {"frozen": self.frozen} if self.peft is None else {"peft": self.peft.arguments()}
        return {**self.settings(), **vars(self.source), **added}

    @property
    def weights_come_back(self) -> bool:
        """Whether it is frozen, and its weights come from timm or a file."""
        return self.frozen and not self.has_learnt and self.source.is_known and not self.source.in_checkpoints

    def image_format(self) -> ImageFormat:
        """The model's input size, mean and standard deviation, from timm's data configuration."""
        config = self._data_config
        return ImageFormat(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))

    def transform(self, augment: bool) -> Callable[[Any], Tensor]:
        """The model's own transform of a PIL image, from timm's data configuration."""
        transform: Callable[[Any], Tensor] = timm.data.create_transform(**self._data_config, is_training=augment)
        return transform


def _average_over_places(features: Tensor, num_features: int) -> Tensor:
    """Features (b, d) of a map (b, d, height, width), or of tokens (b, ..., d); such features stay as they are.

    Example:
        >>> _average_over_places(torch.ones(2, 5, 3, 3), 5).shape, _average_over_places(torch.ones(2, 9, 5), 5).shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """
    if features.dim() == 2:
        return features
    tokens = features if features.shape[-1] == num_features else features.movedim(1, -1)
    return tokens.flatten(1, -2).mean(dim=1)


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
