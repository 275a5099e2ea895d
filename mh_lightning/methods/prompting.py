"""What methods share that prompt a frozen vision transformer: learnt inputs beside the image's own."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning.backbones import TimmBackbone
from mh_lightning.backbones.peft.prompts import has_tokens
from mh_lightning.backbones.vit_tokens import embedded, pooled, takes_prefixes, with_prefix
from mh_lightning.compat.lightning_names import expect_unused_parameters
from mh_lightning.errors import UserError
from mh_lightning.methods.base import Batch, ContinualMethod, Head


class PromptMethod(ContinualMethod):
    """A head on the features of a frozen vision transformer that is prompted by what it answers without prompts, the
    query. Subclasses make the prompts, and choose among them.

    Args:
        backbone: a `mh_lightning.backbones.TimmBackbone` of a vision transformer, frozen.
        head: makes the head from the numbers of features and of classes.
        options: of `ContinualMethod`; ``classes_in_loss: task`` is as published.

    Attributes:
        tasks_begun: tasks that have begun, those of earlier fits included.

    Raises:
        UserError: if the backbone has no tokens, or is trained.
    """

    answers_from_features = False
    tasks_begun: Tensor

    def __init__(self, backbone: nn.Module, head: Head, **options: Any) -> None:
        super().__init__(backbone, head, **options)
        name = type(self).__name__
        if not isinstance(self.backbone, TimmBackbone) or not has_tokens(self.backbone.model):
            raise UserError(
                f"model.init_args.backbone: {name} prompts the tokens of a vision transformer, and this backbone has "
                "none; take a TimmBackbone such as vit_base_patch16_224."
            )
        if not self.backbone.frozen:
            raise UserError(f"model.init_args.backbone: {name} prompts a frozen backbone; leave frozen and peft out.")
        self.prompts: nn.Module | None = None
        self.register_buffer("tasks_begun", torch.zeros((), dtype=torch.long))

    @property
    def transformer(self) -> Any:
        """The model of timm."""
        return self.backbone.model

    def setup(self, stage: str) -> None:
        """Refuse kept features; and prompts that a step does not use get no gradient, which ranks must expect."""
        super().setup(stage)
        if self.stream.feature_cache is not None:
            raise UserError(
                f"data.feature_cache: {type(self).__name__} prompts the backbone with each image; leave it out."
            )
        if isinstance(self.trainer.strategy, DDPStrategy):
            expect_unused_parameters(self.trainer.strategy)

    def make_parts(self) -> None:
        """Make the head and the prompts of all tasks."""
        super().make_parts()
        self.prompts = self.make_prompts(len(self.stream.learnt().class_groups))

    def configure_model(self) -> None:
        """Make the parts, once; a fit that goes on has prompts for more tasks, and those that were learnt stay."""
        super().configure_model()
        if not self.goes_on:
            return
        assert self.prompts is not None
        learnt, self.prompts = self.prompts, self.make_prompts(len(self.stream.learnt().class_groups))
        self.prompts.load_state_dict({**self.prompts.state_dict(), **learnt.state_dict()})
        self.prompts.to(self.device)

    @abstractmethod
    def make_prompts(self, num_tasks: int) -> nn.Module:
        """What is learnt beside the head, for so many tasks; of more tasks, the first ones have the same names."""

    @abstractmethod
    def prompted(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, n) of images, prompted by their queries (b, n), and what the loss has besides, (b,)."""

    def on_task_start(self, task: int) -> None:
        """The prompts of the task are there from now on."""
        self.tasks_begun.fill_(self.stream.num_earlier_tasks + task + 1)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the batch, and that of its prompts."""
        x, targets, _ = batch
        features, losses = self.prompted(x, self.query(x))
        assert self.head is not None
        logits = self.head(features)
        return self.mean_loss(self.seen_by_loss(logits, targets), targets) + self.mean_over_samples(losses), logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, C) of images."""
        assert self.head is not None
        logits: Tensor = self.head(self.prompted(x, self.query(x))[0])
        return logits

    def answering_head(self) -> nn.Module:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self).__name__} prompts its backbone anew with each image, and cannot be exported.")

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """Features (b, n) without prompts."""
        if self._inputs_are_features:
            raise UserError(f"{type(self).__name__} prompts the backbone with each image; give images, not features.")
        return self.features(x)

    def features_with_prefixes(self, x: Tensor, prefixes: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Features (b, n) of images where some blocks, by their places, see keys and values (b, l, d) of their own."""
        tokens = embedded(self.transformer, x)
        for place, block in enumerate(self.transformer.blocks):
            tokens = with_prefix(block, tokens, *prefixes[place]) if place in prefixes else block(tokens)
        return self.normalised(pooled(self.transformer, tokens))

    def normalised(self, features: Tensor) -> Tensor:
        """Features (b, n) as the backbone gives them."""
        assert isinstance(self.backbone, TimmBackbone)
        return F.normalize(features, dim=1) if self.backbone.normalize_features else features

    def check_layers(self, option: str, layers: list[int]) -> None:
        """See that the transformer has the blocks that are to be prompted.

        Raises:
            UserError: otherwise.
        """
        depth = len(self.transformer.blocks)
        if not all(takes_prefixes(block) for block in self.transformer.blocks):
            raise UserError(
                f"model.init_args.backbone: the blocks of this transformer have an attention of their own kind, which "
                f"{type(self).__name__} cannot prompt; take one such as vit_base_patch16_224."
            )
        if not layers or len({*layers}) < len(layers) or any(not 0 <= layer < depth for layer in layers):
            raise UserError(
                f"model.init_args.{option}={layers}: the transformer has the blocks 0 to {depth - 1}; give some of "
                "these, each once."
            )
