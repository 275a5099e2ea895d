"""Modules of any origin as backbones: whatever gives a tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mh_lightning.backbones.base import Backbone, ImageFormat, check_features, leaving_no_trace
from mh_lightning.backbones.trained import TrainedBackbone, TrainingOptions
from mh_lightning.errors import UserError, out_of_memory, reason_of, require


class ModuleBackbone(TrainedBackbone):
    """Any module whose output is a tensor; its features are that output, flattened.

    A method makes it of a plain module: ``backbone: {class_path: my.Net}`` in a configuration is `ModuleBackbone` of
    ``my.Net()`` with its defaults. The width of the features is that of the stream's first sample.

    Args:
        module: maps a batch of inputs to a tensor (b, ...) of floating-point numbers.
        frozen: no gradient, always in evaluation mode, no graph.
        image_size: resize and cut images to squares of so many pixels, at least 1, with values from 0 to 1. By default
            they are taken as they are, and then they must all be of one size.
        normalize_features: divide each feature vector by its L2 norm.
        learning_rate_factor: at least 0, what the optimizer's learning rate is multiplied by for the module.
        weight_decay: at least 0, of the module, by default the optimizer's.
        frozen_batch_norm: keep the running statistics of a trained module's batch-norm layers, and normalise by them
            in training too; their weights and biases still learn.

    Raises:
        UserError: on options that contradict each other.

    Example:
        >>> backbone = ModuleBackbone(nn.Conv2d(3, 4, 3))
        >>> backbone.prepare(torch.zeros(1, 3, 8, 8))
        >>> backbone.num_features, backbone(torch.zeros(2, 3, 8, 8)).shape
        (144, torch.Size([2, 144]))
    """

    num_features: int = 0  # until a sample has passed

    def __init__(
        self,
        module: nn.Module,
        frozen: bool = False,
        image_size: int | None = None,
        normalize_features: bool = False,
        learning_rate_factor: float = 1.0,
        weight_decay: float | None = None,
        frozen_batch_norm: bool = False,
    ) -> None:
        options = TrainingOptions(learning_rate_factor, weight_decay, frozen_batch_norm=frozen_batch_norm)
        super().__init__(options, frozen)
        require("backbone.image_size", image_size, at_least=1)
        self.module, self.image_size, self.normalize_features = module, image_size, normalize_features
        if frozen:
            self.requires_grad_(False)
        if frozen or frozen_batch_norm:
            self.train()

    @property
    def name(self) -> str:
        """Of the module's class."""
        return f"{type(self.module).__module__}.{type(self.module).__qualname__}"

    def prepare(self, sample: Tensor) -> None:
        """Find the width of the features by passing a sample (1, ...) on, which leaves no trace in the module.

        Raises:
            UserError: if it does not pass, or does not give a tensor.
        """
        if self.num_features:
            return
        tensors = [one for one in (*self.parameters(), *self.buffers()) if not is_lazy(one)]
        inputs = torch.cat([sample, sample]).to(tensors[0].device if tensors else sample.device)
        whose = f"model.init_args.backbone: {self.name}"
        try:
            with leaving_no_trace(self):
                features = self.module(inputs)
        except Exception as error:
            if isinstance(error, UserError) or out_of_memory(error):
                raise
            raise UserError(
                f"{whose} does not take the stream's first sample, of shape {tuple(sample.shape[1:])} "
                f"({type(error).__name__}: {reason_of(error)})."
            ) from error
        width = features.numel() // 2 if isinstance(features, Tensor) and features.shape[:1] == (2,) else 0
        self.num_features = check_features(_vectors(features, 2), 2, width or 1, whose).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (b, ...) to features (b, num_features)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = _vectors(self.module(x), len(x))
            return F.normalize(features, dim=1) if self.normalize_features else features

    def settings(self) -> dict[str, Any]:
        """The module's class, the image size and whether features are normalised."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        return {"name": self.name, **size, "normalize_features": self.normalize_features}

    def image_format(self) -> ImageFormat | None:
        """Squares of `image_size` with values from 0 to 1."""
        return None if self.image_size is None else ImageFormat(self.image_size, (0.0,) * 3, (1.0,) * 3)

    def transform(self, augment: bool) -> Callable[[Any], Tensor] | None:
        """With an `image_size`: resize the shorter side to it and cut the centre, or, to augment, a part of random size
        and shape, flipped at random.
        """
        size, bicubic = self.image_size, InterpolationMode.BICUBIC
        if size is None:
            return None
        if augment:
            steps = [transforms.RandomResizedCrop(size, interpolation=bicubic), transforms.RandomHorizontalFlip()]
        else:
            steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size)]
        whole: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.ToTensor()])
        return whole


def _vectors(output: Any, rows: int) -> Any:
    """A tensor of any shape that has a part for each of the inputs, as vectors (rows, ...); also one that has lost its
    first dimension, as by `squeeze` of a single input.
    """
    if not isinstance(output, Tensor) or output.dim() == 0:
        return output
    if rows == 1 != output.shape[0]:
        return output.reshape(1, -1)
    return output.unsqueeze(1) if output.dim() == 1 else output.flatten(1)


def as_backbone(module: nn.Module) -> Backbone:
    """A backbone as it is, and any other module as a `ModuleBackbone`.

    Raises:
        UserError: if it is no module.

    Example:
        >>> as_backbone(nn.Flatten())
        ModuleBackbone(
          (module): Flatten(start_dim=1, end_dim=-1)
        )
    """
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model.init_args.backbone must be a torch.nn.Module, such as mh_lightning.backbones.TimmBackbone, got a "
            f"{type(module).__name__}."
        )
    return module if isinstance(module, Backbone) else ModuleBackbone(module)
