"""Under the trainer, too, a step that is not taken leaves keys, counters and memories as they were."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity
from mh_lightning.methods import FineTuning
from tests.fits import fit, stream

STEPS_PER_TASK = 4


def head(features: int, classes: int) -> MHLinear:
    torch.manual_seed(0)
    return MHLinear.published(features, classes, key_mem_units=6, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", beta_k=0.1,
                    scramble=True, tau_alpha=0.9, tau_eta=0, distance="euclidean", sigma_eu="auto")  # fmt: skip


class Watched(FineTuning):
    """Gradients overflow in every other step; notes the state after each."""

    def __init__(self, overflow: bool, **options: Any) -> None:
        super().__init__(Identity(5), head, optimizer=lambda params: SGD(params, lr=0.1), **options)
        self.overflow = overflow
        self.states: list[dict[str, Tensor]] = []
        self.extra = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        learnt = super().training_step(batch, batch_idx)
        if batch_idx % 2 and self.overflow:
            learnt["loss"] = learnt["loss"] + 0 * self.extra.sum()
            self.extra.register_hook(lambda gradient: gradient + math.inf)
        return learnt

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.head is not None
        self.states.append({name: value.clone() for name, value in self.head.state_dict().items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, value in one.items() if torch.equal(value, other[name])]


def data() -> Any:
    return stream(batch_size=40, first_task_size=7)


@pytest.mark.parametrize("only_touched_units", [False, True])
def test_scaled_gradients_that_overflow(only_touched_units: bool, tmp_path: Path) -> None:
    method = Watched(overflow=True, only_touched_units=only_touched_units)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    fit(method, tmp_path, data(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], callbacks=[])
    names = list(method.states[0])
    taken, skipped = method.states[::2], method.states[1::2]
    assert len(skipped) >= 2
    for before, after in zip(taken, skipped, strict=False):
        assert same(before, after) == names
    assert method.head is not None and method.head.key_counter.sum() == 40 * len(taken)
    assert all(value.isfinite().all() for value in method.head.state_dict().values())


class Refusing(Watched):
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)


def test_clipping_that_refuses(tmp_path: Path) -> None:
    method = Refusing(overflow=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        fit(method, tmp_path, data(), callbacks=[])
    assert method.head is not None and len(method.states) == 1
    assert same(method.states[0], method.head.state_dict()) == list(method.states[0])


def test_without_overflow_every_step_counts(tmp_path: Path) -> None:
    method = Refusing(overflow=False)
    fit(method, tmp_path, data(), callbacks=[])
    assert method.head is not None and method.head.key_counter.sum() > 40 * (len(method.states) - 1)
