"""One fit after the other, with the same stream or the same method: nothing of one is silently in the other."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

import mh_lightning
from mh_lightning.backbones import Identity
from mh_lightning.callbacks import EarlierTasks, TaskCheckpoints
from mh_lightning.data.splits import Splits
from mh_lightning.errors import UserError
from mh_lightning.growth import grown
from mh_lightning.heads import TruncatedNormalLinear
from mh_lightning.methods import SLCA, ExperienceReplay, FineTuning, JointTraining
from tests.blobs import FEATURES
from tests.fits import fit
from tests.inference.test_going_on import learnt, part

LINEAR = partial(FineTuning, Identity(FEATURES), nn.Linear, partial(torch.optim.SGD, lr=0.3))


def trainer(folder: Path, **options: Any) -> mh_lightning.Trainer:
    return mh_lightning.Trainer(run_dir=folder, logger=False, accelerator="cpu", pictures=False,
                                enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_a_stream_forgets_the_model_before(tmp_path: Path) -> None:
    data = part([0, 1, 2, 3])
    first = learnt(LINEAR(), tmp_path / "first", data)
    trainer(tmp_path).test(first, datamodule=data)
    again = learnt(LINEAR(), tmp_path / "again", data)
    assert same(first, again) and again.learnt_stream == first.learnt_stream
    learnt(SLCA(Identity(FEATURES), nn.Linear), tmp_path / "slca", data)
    more = part([4, 5])
    learnt(again, tmp_path / "more", more)
    fresh = learnt(LINEAR(), tmp_path / "fresh", more)
    assert fresh.learnt_stream.class_names == ["eel", "fox"] and fresh.head.out_features == 2


def test_a_run_is_resumed_with_the_model_it_went_on_from(tmp_path: Path) -> None:
    learnt(LINEAR(), tmp_path / "first", part([0, 1, 2, 3]))
    model = mh_lightning.load(tmp_path / "first").method
    whole = learnt(model, tmp_path / "second", part([4, 5, 6], [1, 2]))
    resume = tmp_path / "second" / "checkpoints" / "task_1.ckpt"
    right = mh_lightning.load(tmp_path / "first").method
    seed_everything(0)
    fit(right, tmp_path / "resumed", part([4, 5, 6], [1, 2]), resume)
    assert len(right.learnt_stream.class_groups) == 4 and right.learnt_stream.epochs == 4
    assert same(right, whole)
    for wrong in (LINEAR(), mh_lightning.load(resume).method):
        seed_everything(0)
        with pytest.raises(UserError, match=r"went on from a model of .'tasks': 2|tells 7 classes apart"):
            fit(wrong, tmp_path / "wrong", part([4, 5, 6], [1, 2]), resume)


def test_a_run_is_resumed_with_the_object_that_began_it(tmp_path: Path) -> None:
    """As in a notebook, where the method is still there."""
    whole, cut = LINEAR(), LINEAR()
    data = part([0, 1, 2, 3, 4], [2, 2, 1])
    seed_everything(0)
    trainer(tmp_path / "whole").fit(whole, datamodule=data)
    seed_everything(0)
    trainer(tmp_path / "cut").fit(cut, datamodule=data)
    runs = trainer(tmp_path / "cut")
    runs.fit(cut, datamodule=data, ckpt_path=next((tmp_path / "cut").rglob("task_1.ckpt")))
    assert same(cut, whole) and cut.learnt_stream == whole.learnt_stream


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x, dim=1), self.weight)


def test_linear_layers_stay_what_they_are() -> None:
    layer = TruncatedNormalLinear(4, 2)
    layer.bias.requires_grad_(False)
    torch.manual_seed(0)
    larger = grown(layer, 200)
    assert type(larger) is TruncatedNormalLinear and not larger.bias.requires_grad and larger.weight.requires_grad
    assert torch.equal(larger.weight[:2], layer.weight) and larger.weight[2:].abs().max() < 2.1  # cut off at 2
    torch.manual_seed(0)
    assert larger.weight[2:].std().item() == pytest.approx(0.02, rel=0.2) and larger(torch.ones(1, 4)).shape == (1, 200)
    with pytest.raises(UserError, match="A Cosine is more than a linear layer"):
        grown(Cosine(4, 2), 3)
    with pytest.raises(UserError, match="more than a linear layer"):
        grown(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), 3)


def test_chunks_of_one_stream_leave_the_next_to_the_trainer(tmp_path: Path) -> None:
    class Steps(Callback):
        count = 0

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.count += 1

    method, steps = LINEAR(), Steps()
    data = part([0, 1])
    data.chunk_size = 16
    learnt(method, tmp_path / "chunks", data)
    assert not method.automatic_optimization
    fit(method, tmp_path / "steps", part([0, 1]), callbacks=[steps], accumulate_grad_batches=2)
    assert method.automatic_optimization and steps.count > 0


def test_a_test_of_unknown_classes_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = learnt(LINEAR(), tmp_path / "first", part([0, 1, 2, 3]))
    with pytest.raises(UserError, match="has not learnt the class 'eel'"):
        trainer(tmp_path).test(model, datamodule=part([0, 4]))
    assert model.head.out_features == 4
    mh_lightning.Model(model).save(tmp_path / "m.mh")
    assert mh_lightning.load(tmp_path / "m.mh").class_names == ["ant", "bee", "cat", "dog"]


def test_a_trial_is_nothing_learnt(tmp_path: Path) -> None:
    for method in (JointTraining(Identity(FEATURES), nn.Linear), SLCA(Identity(FEATURES), nn.Linear)):
        trainer(tmp_path, fast_dev_run=True).fit(method, datamodule=part([0, 1, 2, 3]))
        assert method.learnt_stream is None
        learnt(method, tmp_path / type(method).__name__, part([0, 1, 2, 3]))


class Teacher(FineTuning):
    """Makes a module after the first task."""

    def make_module(self, name: str) -> nn.Module:
        return nn.Linear(2, 2)

    def on_task_end(self, task: int) -> None:
        self.teacher = self.make_module("teacher")


def test_what_a_method_makes_is_not_trained_in_the_next_fit_either(tmp_path: Path) -> None:
    method = learnt(Teacher(Identity(FEATURES), nn.Linear), tmp_path / "first", part([0, 1, 2, 3]))
    loaded = mh_lightning.load(tmp_path / "first", trust=["tests"]).method
    for name, again in (("again", method), ("loaded", loaded)):
        assert again.teacher is not None
        learnt(again, tmp_path / name, part([4, 5]))
        assert {id(one) for one in again.head_parameters_to_train()} == {id(one) for one in again.head.parameters()}


def test_double_precision_stays(tmp_path: Path) -> None:
    seed_everything(0)
    method = LINEAR()
    fit(method, tmp_path / "first", part([0, 1, 2, 3]), precision="64-true")
    loaded = mh_lightning.load(tmp_path / "first")
    assert same(loaded.method, method) and loaded.method.head.weight.dtype == torch.float64
    assert loaded.predict(torch.randn(3, FEATURES)).probabilities.shape == (3, 4)


def test_samples_of_another_shape_than_the_buffer_holds(tmp_path: Path) -> None:
    method = ExperienceReplay(nn.Flatten(), nn.Linear, buffer_size=20)
    learnt(method, tmp_path / "first", part([0, 1]))
    data = part([2, 3])
    first, second = data.load()[:2]
    wider = [one._replace(inputs=one.inputs.unsqueeze(2)) for one in (first, second)]
    data.load = lambda: Splits(wider[0], wider[1], ["cat", "dog"])  # type: ignore[method-assign]
    with pytest.raises(UserError, match="The replay buffer holds samples of shape"):
        fit(method, tmp_path / "second", data)


def test_a_run_that_was_cut_short_cannot_go_on_with_heads_of_tasks(tmp_path: Path) -> None:
    learnt(SLCA(Identity(FEATURES), nn.Linear), tmp_path / "first", part([0, 1, 2, 3]))
    cut = mh_lightning.load(tmp_path / "first" / "checkpoints" / "task_1.ckpt").method
    with pytest.raises(UserError, match="cut short after task 1 of 2"):
        fit(cut, tmp_path / "second", part([4, 5]))


def test_earlier_tasks_in_all_rows_that_were_measured(tmp_path: Path) -> None:
    def results(folder: str) -> list[list[float | None]]:
        return json.loads((tmp_path / folder / "results.json").read_text())["parent"]["accuracy_matrix_of_both"]  # type: ignore[no-any-return]

    learnt(LINEAR(), tmp_path / "first", part([0, 1]))
    second = mh_lightning.load(tmp_path / "first").method
    fit(
        second,
        tmp_path / "second",
        part([2, 3, 4], [1, 2]),
        callbacks=[EarlierTasks([part([0, 1])]), TaskCheckpoints()],
    )
    third = mh_lightning.load(tmp_path / "second").method
    fit(third, tmp_path / "third", part([5], 1))
    assert all(row[0] is not None for row in results("third")[:3]) and results("third")[3][:3] == [None] * 3
    # added where a run is resumed: what was not measured is not there
    learnt(mh_lightning.load(tmp_path / "first").method, tmp_path / "bare", part([2, 3, 4], [1, 2]))
    resumed = mh_lightning.load(tmp_path / "first").method
    seed_everything(0)
    fit(resumed, tmp_path / "resumed", part([2, 3, 4], [1, 2]), tmp_path / "bare" / "checkpoints" / "task_1.ckpt",
        callbacks=[EarlierTasks([part([0, 1])])])  # fmt: skip
    assert [row[0] is None for row in results("resumed")] == [False, True, False]
    # of the same object in Python
    fit(second, tmp_path / "again", part([6], 1), callbacks=[EarlierTasks([part([0, 1]), part([2, 3, 4], [1, 2])])])
    assert results("again") == [[*results("again")[0][:3], results("again")[0][3]]] and None not in results("again")[0]


@pytest.mark.parametrize("first", [True, False])
def test_earlier_tasks_see_the_model_that_is_evaluated(first: bool, tmp_path: Path) -> None:
    """Whichever callback comes first: the running average of weights."""
    learnt(LINEAR(), tmp_path / "first", part([0, 1]))
    measured, averages = EarlierTasks([part([0, 1])]), EMAWeightAveraging(decay=0.5)
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.head.weight.detach().clone())

    inside: list[Tensor] = []
    forward = nn.Linear.forward

    class Noted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                inside.append(self.weight.detach().clone())
            return forward(self, x)

    method = mh_lightning.load(tmp_path / "first").method
    method.head.__class__ = Noted
    callbacks: list[Callback] = [averages, measured] if first else [measured, averages]
    fit(method, tmp_path / "second", part([1, 0]), callbacks=[*callbacks, Watch()])
    assert torch.equal(inside[-2], inside[-1]) and torch.equal(inside[-1], seen[-1])
