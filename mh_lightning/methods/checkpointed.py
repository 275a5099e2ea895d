"""What is saved of a method, and how it comes back: into a trainer's run, or into a model without one."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mh_lightning.backbones import Backbone
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.methods.backbone_weights import (
    check_fingerprint,
    drop_backbone,
    fingerprint_of_weights,
    is_in_float32,
)
from mh_lightning.methods.checkpoint_checks import check_complete, check_kept_features, check_state
from mh_lightning.methods.description import described
from mh_lightning.methods.optimization import Trained
from mh_lightning.methods.trainer_checks import check_trainer_options, trainer_options
from mh_lightning.sized_by_state import SizedByState

Head = Callable[[int, int], nn.Module]  # makes a head from the numbers of features and of classes


class Checkpointed(Trained):
    """A backbone and a head of a stream's classes, with all that a checkpoint says of them.

    Args:
        backbone: maps inputs to features.
        head: makes the head from the numbers of features and of classes.

    Attributes:
        learnt_stream: what an earlier fit has learnt; None before the first.
        left_behind: names of what it learnt with and was not loaded.
        parent: of the run that this one goes on with: where it lies, and its accuracy matrix.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module | None = None
        self._make_head = head
        self._inputs_are_features = False
        self.learnt_stream: LearntStream | None = None
        self.left_behind: list[str] = []
        self.parent: dict[str, Any] = {}
        self.optimizer_settings: dict[str, str] = {}
        self._settings_of_checkpoint: dict[str, str] | None = None
        self._optimizers_of_checkpoint: int | None = None

    @abstractmethod
    def make_module(self, name: str) -> nn.Module:
        """See `ContinualMethod`."""

    @property
    def stream(self) -> StreamDataModule:
        """What is learnt: its tasks, classes and loaders; of a method that was loaded without a trainer, a
        `mh_lightning.data.LearntStream`.
        """
        stream: Any = self.learnt_stream if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        assert stream is not None, "a method has a stream when a trainer runs it"
        return stream  # type: ignore[no-any-return]

    @property
    def goes_on(self) -> bool:
        """Whether a fit adds to what an earlier one has learnt."""
        return self.learnt_stream is not None and self.trainer.state.fn == "fit"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which method, backbone, head, optimizer and trainer the state belongs to."""
        checkpoint.update(self.description())
        checkpoint["trainer_options"] = trainer_options(self.trainer)
        checkpoint["optimizer_settings"] = self.optimizer_settings
        if self.backbone.weights_come_back and is_in_float32(self.backbone):
            checkpoint["backbone_weights"] = fingerprint_of_weights(self.backbone)
            drop_backbone(checkpoint["state_dict"])

    def learnt_now(self) -> LearntStream:
        """Classes and images of the stream: of a fit that goes on, or of what was learnt before."""
        fits = self._trainer is not None and self.trainer.state.fn == "fit" and self.trainer.state.status == "running"
        return self.stream.learnt() if fits or self.learnt_stream is None else self.learnt_stream

    def description(self) -> dict[str, Any]:
        """What `mh_lightning.load` makes the model from, beside its state, in plain values."""
        configured = None if self._trainer is None else getattr(self.trainer, "configuration", {}).get("model")
        learnt = self.learnt_now()
        return {
            "architecture": self.architecture(),
            "num_classes": learnt.num_classes,
            "num_features": self.backbone.num_features,
            "model": configured or described(self, self._make_head),
            "stream": learnt.as_plain(),
            "backbone_settings": self.backbone.settings(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with this model, and where a fit goes on, with its trainer.

        Raises:
            UserError: if the checkpoint belongs to another configuration.
        """
        fitting = self.trainer.state.fn == "fit"
        check_complete(checkpoint, fitting)
        if fitting and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_trainer_options(checkpoint.get("trainer_options"), trainer_options(self.trainer))
        self._settings_of_checkpoint = checkpoint.get("optimizer_settings")
        self._optimizers_of_checkpoint = len(checkpoint.get("optimizer_states") or []) if fitting else None
        self.complete(checkpoint)
        check_state(checkpoint, self.architecture(), self.stream.num_classes, self.state_dict())
        if self._inputs_are_features:
            check_kept_features(checkpoint["state_dict"], self.backbone)

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Make what a checkpoint has state for and this method does not yet, and give the checkpoint the weights of the
        backbone if it only names them.

        Raises:
            UserError: if the backbone has other ones.
        """
        self._make_what_came_later(checkpoint.get("state_dict"))
        if "backbone_weights" in checkpoint:
            check_fingerprint(checkpoint["backbone_weights"], self.backbone)
            state = self.backbone.state_dict()
            checkpoint["state_dict"].update({f"backbone.{name}": value for name, value in state.items()})

    def _make_what_came_later(self, weights: Any) -> None:
        """Make the modules and buffers that a method had made while it was trained, for a checkpoint to fill."""
        if not isinstance(weights, dict):
            return  # refused below
        for name, module in self.named_modules():
            if isinstance(module, SizedByState):
                module.take_sizes(weights, f"{name}.")
        for name, value in weights.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                continue  # refused below
            child, dot, _ = name.partition(".")
            if dot and self._modules.get(child) is None and vars(self).get(child) is None:
                setattr(self, child, self.make_module(child).to(self.device))
            elif not dot and name not in self._parameters and _differs(self._buffers.get(name), value):
                self.register_buffer(name, torch.empty_like(value, device=self.device))

    def architecture(self) -> str:
        """Names of the method, the backbone and the head."""
        parts = [type(self).__name__, type(self.backbone).__name__]
        if hasattr(self.backbone, "name"):
            parts.append(str(self.backbone.name))
        return "/".join([*parts, type(self.head).__name__])


def _differs(buffer: Tensor | None, saved: Tensor) -> bool:
    return buffer is None or buffer.shape != saved.shape
