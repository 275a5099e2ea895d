"""What every backbone is: a module that gives a feature vector for each input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mh_lightning.errors import UserError


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
    learnt_bytes: int = 0  # of what it had trained when it was frozen

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
        """Plain values by which a reader knows it, such as its name and image size."""
        return {}

    def arguments(self) -> dict[str, Any] | None:
        """Plain arguments that make it again, but for its weights; None if there are no such."""
        return None

    @property
    def weights_come_back(self) -> bool:
        """Whether making it again brings its weights, too, so that checkpoints need not hold them."""
        return False

    def parameter_groups(self) -> list[ParameterGroup]:
        """All its trainable parameters, each once, by how the optimizer treats them."""
        return [ParameterGroup([parameter for parameter in self.parameters() if parameter.requires_grad])]

    def optimizer_settings(self) -> dict[str, Any]:
        """Options, other than their defaults, that `parameter_groups` follows from; a run is resumed with the same."""
        return {}

    def finish_training(self) -> None:
        """From now on it is frozen; what is trained beside its weights becomes a part of them, where it can."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.learnt_bytes += sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.requires_grad_(False).eval()

    def prepare(self, sample: Tensor) -> None:
        """Look at one input (1, ...) of the stream, before anything follows from `num_features`."""


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

    def arguments(self) -> dict[str, Any]:
        """The number of features."""
        return {"num_features": self.num_features}

    def forward(self, x: Tensor) -> Tensor:
        """Pass the features (b, num_features) on, flattened."""
        x = x.flatten(1)
        if x.shape[1] != self.num_features:
            raise UserError(
                f"backbone.num_features is {self.num_features}, but the data has {x.shape[1]} features a "
                f"sample; set it to {x.shape[1]}."
            )
        return x


def check_features(features: object, rows: int, num_features: int, whose: str = "model.init_args.backbone") -> Tensor:
    """The output of a backbone, if it is what one gives.

    Args:
        features: what it gave.
        rows: inputs that it was given.
        num_features: width of its features.
        whose: named if it is something else.

    Raises:
        UserError: if it is not a tensor (rows, num_features) of real floating-point numbers.

    Example:
        >>> check_features({"logits": torch.ones(2, 3)}, 2, 3)
        Traceback (most recent call last):
        ...
        mh_lightning.errors.UserError: model.init_args.backbone gives a dict with 'logits', where its features must be \
a tensor of floating-point numbers; wrap it in a module whose forward returns that tensor.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise UserError(
            f"{whose} gives {_kind_of(features)}, where its features must be a tensor of floating-point numbers; wrap "
            "it in a module whose forward returns that tensor."
        )
    if features.shape != (rows, num_features):
        raise UserError(
            f"{whose} gives a tensor of shape {tuple(features.shape)} for {rows} inputs, where its features must have "
            f"the shape {(rows, num_features)}; all inputs must be of one size, and each give one vector."
        )
    return features


def _kind_of(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {str(output.dtype).removeprefix('torch.')}"
    keys = f" with {', '.join(map(repr, output))}" if isinstance(output, dict) else ""
    return f"a {type(output).__name__}{keys}"


@contextmanager
def mode_of(module: nn.Module, training: bool) -> Iterator[None]:
    """A module in training or in evaluation mode for a while."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


@contextmanager
def leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode and without gradients, whose buffers and modes, and all random generators, are
    afterwards what they were before.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with leaving_no_trace(norm):
        ...     _ = norm.train()(torch.randn(4, 2))
        >>> norm.training, norm.running_mean
        (True, tensor([0., 0.]))
    """
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    values = [buffer.detach().clone() for _, _, buffer in buffers]
    with torch.no_grad(), isolate_rng(), mode_of(module, training=False):
        try:
            yield
        finally:
            for (part, name, buffer), value in zip(buffers, values, strict=True):
                setattr(part, name, buffer.copy_(value))  # a forward may have put another in its place
