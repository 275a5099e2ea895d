"""Backbones that are trained: their own learning rate and weight decay, frozen batch norm, compilation."""

import copy
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CyclicLR, LinearLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from mh_lightning import MHLinear
from mh_lightning.backbones import Backbone, ParameterGroup, TimmBackbone
from mh_lightning.callbacks import TaskBoundaries
from mh_lightning.data import Tensors
from mh_lightning.data.features.description import described
from mh_lightning.data.features.fingerprint import description_of
from mh_lightning.methods import ContinualMethod, FineTuning, GDumb, MaximallyInterferedRetrieval
from tests.conftest import results_of, weights_of
from tests.data.refusal import refused

CNN, VIT = "test_resnet", "test_vit"
Run = Callable[..., Path]
SGD = partial(torch.optim.SGD, lr=0.5)
memory_head = partial(MHLinear.published, key_mem_units=6, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")


class Linear(Backbone):
    """Two linear maps; the second learns slowly."""

    def __init__(self, factor: float = 0.01, weight_decay: float | None = None) -> None:
        super().__init__()
        self.num_features = 3
        self.fast, self.slow = nn.Linear(4, 3), nn.Linear(3, 3)
        self.factor, self.weight_decay = factor, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.slow(self.fast(x).tanh())
        return out

    def parameter_groups(self) -> list[ParameterGroup]:
        slow = ParameterGroup(list(self.slow.parameters()), self.factor, self.weight_decay)
        return [ParameterGroup(list(self.fast.parameters())), slow]


@pytest.fixture
def stream() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(4)
    inputs = nn.functional.one_hot(labels).float() + 0.1 * torch.randn(16, 4, generator=generator)
    return Tensors(inputs, labels, inputs, labels, increment=2, batch_size=8)


@pytest.fixture
def images() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3] * 2)
    return Tensors(pixels, labels, pixels, labels, increment=2, batch_size=4)


def fit(method: ContinualMethod, data: Tensors, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=-1, reload_dataloaders_every_n_epochs=1,
                      num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=mkdtemp(dir=folder),
                      callbacks=[TaskBoundaries()], **options)  # fmt: skip
    trainer.fit(method, datamodule=data)
    return trainer


def made_optimizer(method: ContinualMethod) -> torch.optim.Optimizer:
    """The method's optimizer, without a trainer."""
    if method.head is None:
        method.head = method._make_head(method.backbone.num_features, 2)
    made: Any = method.configure_optimizers()
    optimizer: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
    return optimizer


# --- groups


def test_one_list_in_the_order_of_the_model_where_nothing_is_special() -> None:
    """Checkpoints of optimizers go by the places of parameters."""
    for backbone in (Linear(factor=1), TimmBackbone(CNN, frozen=False), TimmBackbone(CNN)):
        method = FineTuning(backbone, nn.Linear, SGD)
        (group,) = made_optimizer(method).param_groups
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained]
        assert group["lr"] == 0.5 and method.optimizer_settings.keys() == made_optimizer(method).defaults.keys()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adadelta])
def test_head_first_then_the_groups_of_the_backbone(kind: type[torch.optim.Optimizer]) -> None:
    method = FineTuning(Linear(weight_decay=0.25), nn.Linear, partial(kind, lr=0.5, weight_decay=0.125))
    head, fast, slow = made_optimizer(method).param_groups
    backbone = method.backbone
    assert isinstance(backbone, Linear) and method.head is not None
    for group, module in ((head, method.head), (fast, backbone.fast), (slow, backbone.slow)):
        assert list(map(id, group["params"])) == list(map(id, module.parameters()))
        assert not group.keys() ^ head.keys()
    assert [group["lr"] for group in (head, fast, slow)] == [0.5, 0.5, 0.005]
    assert [group["weight_decay"] for group in (head, fast, slow)] == [0.125, 0.125, 0.25]


def test_learning_rate_in_a_tensor() -> None:
    optimizer = made_optimizer(FineTuning(Linear(), nn.Linear, partial(torch.optim.Adam, lr=torch.tensor(0.5))))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.5, 0.005])


def test_one_step_by_hand() -> None:
    lr, decay = 0.5, 0.125
    backbone = TimmBackbone(CNN, image_size=32, frozen=False, learning_rate_factor=0.01, weight_decay=decay)
    method = FineTuning(backbone, nn.Linear, SGD)
    optimizer = made_optimizer(method)
    x, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    method.losses(method(x), targets, "mean").backward()
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    optimizer.step()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        if name.startswith("backbone."):
            expected = before[name] - lr * 0.01 * (parameter.grad + decay * before[name])
        else:
            expected = before[name] - lr * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
    stem = method.get_parameter("backbone.model.conv1.0.weight")
    assert stem.grad is not None and stem.grad.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (VIT, ["patch_embed.", *(f"blocks.{i}." for i in range(6))]),
        (CNN, ["conv1.", *(f"layer{i}." for i in range(1, 5))]),
    ],
)
def test_layer_decay_block_by_block(name: str, blocks: list[str]) -> None:
    backbone = TimmBackbone(name, frozen=False, learning_rate_factor=0.1, weight_decay=0.2, layer_decay=0.5)
    groups = backbone.parameter_groups()
    assert len(groups) == len(blocks)
    assert {group.weight_decay for group in groups} == {0.2}
    factors = {id(parameter): group.learning_rate_factor for group in groups for parameter in group.parameters}
    assert factors.keys() == set(map(id, backbone.parameters()))
    assert sum(len(group.parameters) for group in groups) == len(factors)  # each once
    names = dict(backbone.model.named_parameters())
    for distance, block in enumerate(reversed(blocks)):
        (mine,) = {factors[id(parameter)] for key, parameter in names.items() if key.startswith(block)}
        assert mine == pytest.approx(0.1 * 0.5**distance)
    outer = {VIT: [("norm.bias", 0), ("cls_token", 6), ("pos_embed", 6)], CNN: [("bn1.weight", 4)]}
    for key, distance in outer[name]:
        assert factors[id(names[key])] == pytest.approx(0.1 * 0.5**distance)


def test_no_layer_decay_is_one_group() -> None:
    for options in ({}, {"layer_decay": 1.0}):
        (group,) = TimmBackbone(VIT, frozen=False, learning_rate_factor=0.1, **options).parameter_groups()
        assert group.learning_rate_factor == 0.1 and group.weight_decay is None


def test_some_of_a_backbone_is_frozen() -> None:
    """What has no gradient is in no group."""
    backbone = TimmBackbone(VIT, frozen=False, layer_decay=0.5)
    backbone.get_submodule("model.blocks.5").requires_grad_(False)
    listed = {id(parameter) for group in backbone.parameter_groups() for parameter in group.parameters}
    assert listed == {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}


# --- methods


class HalfHead(FineTuning):
    """Trains the head's bias only."""

    def head_parameters_to_train(self) -> list[nn.Parameter]:
        assert isinstance(self.head, nn.Linear)
        return [self.head.bias]


@pytest.mark.parametrize("factor", [1, 0.01])
def test_a_method_chooses_what_of_its_head_is_trained(factor: float, stream: Tensors, tmp_path: Path) -> None:
    method = HalfHead(Linear(factor), nn.Linear, SGD)
    optimizer = made_optimizer(method)
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert isinstance(method.head, nn.Linear) and len(listed) == 5 and id(method.head.weight) not in listed
    assert (listed[0] == id(method.head.bias)) == (factor != 1)
    method = HalfHead(Linear(factor), nn.Linear, SGD)
    fit(method, stream, tmp_path)


@pytest.mark.parametrize("reset", [False, True])
def test_schedulers_scale_all_groups(reset: bool, stream: Tensors, tmp_path: Path) -> None:
    """Two tasks of one epoch; the rate falls after the first, or starts again."""
    scheduler = partial(MultiStepLR, milestones=[1], gamma=0.5)
    method = FineTuning(Linear(), nn.Linear, SGD, scheduler, reset_optimizer=reset)
    rates: list[list[float]] = []
    method.on_before_zero_grad = lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups])  # type: ignore[method-assign]
    fit(method, stream, tmp_path)
    expected = torch.tensor([[0.5, 0.5, 0.005]]) * torch.tensor([[1.0], [1.0 if reset else 0.5]])
    torch.testing.assert_close(torch.tensor(rates), expected)


@pytest.mark.parametrize("scheduler", [ReduceLROnPlateau, partial(LinearLR, start_factor=0.1)])
def test_other_schedulers_keep_the_ratio(scheduler: Any) -> None:
    head, _, slow = made_optimizer(FineTuning(Linear(), nn.Linear, SGD, scheduler)).param_groups
    assert slow["lr"] == pytest.approx(0.01 * head["lr"])


@pytest.mark.parametrize(
    "scheduler", [partial(OneCycleLR, max_lr=0.1, total_steps=10), partial(CyclicLR, base_lr=0.1, max_lr=1.0)]
)
def test_schedulers_that_set_rates_themselves_are_refused(scheduler: Any) -> None:
    method = FineTuning(Linear(), nn.Linear, SGD, scheduler)
    refused(
        lambda: made_optimizer(method), "model.init_args.lr_scheduler", scheduler.func.__name__, "learning_rate_factor"
    )
    made_optimizer(FineTuning(Linear(factor=1), nn.Linear, SGD, scheduler))


def test_optimizers_that_cannot_are_refused() -> None:
    method = FineTuning(Linear(weight_decay=0.1), nn.Linear, torch.optim.Rprop)
    refused(lambda: made_optimizer(method), "model.init_args.optimizer", "Rprop", "backbone.weight_decay=0.1")
    made_optimizer(FineTuning(Linear(), nn.Linear, torch.optim.Rprop))
    refused(
        lambda: made_optimizer(FineTuning(Linear(), nn.Linear, torch.optim.LBFGS)), "model.init_args.optimizer", "LBFGS"
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_only_touched_units(kind: Any, clip: float | None, stream: Tensors, tmp_path: Path) -> None:
    """Units of the head are stepped one by one, the backbone at its own rate."""
    torch.manual_seed(0)
    method = FineTuning(Linear(), memory_head, partial(kind, lr=0.1), only_touched_units=True)
    trainer = fit(method, stream, tmp_path, gradient_clip_val=clip)
    (optimizer,) = trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.001]
    units = [len(group["params"]) for group in optimizer.state_dict()["param_groups"]]
    assert units == [6, 2, 2]
    again = method._new_optimizer()
    again.load_state_dict(optimizer.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())


def test_methods_that_learn_anew_use_the_groups(images: Tensors, tmp_path: Path) -> None:
    """With a learning rate of nothing the backbone's weights stay what they were, and the head's do not."""
    for factor, moves in ((0.0, False), (0.01, True)):
        backbone = TimmBackbone(CNN, image_size=32, frozen=False, learning_rate_factor=factor)
        before = copy.deepcopy(dict(backbone.named_parameters()))
        method = GDumb(backbone, nn.Linear, 4, epochs=1, optimizer=SGD)
        fit(method, images, tmp_path)
        moved = [not torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters()]
        assert any(moved) == moves


def test_imagined_steps_take_each_parameter_at_its_own_rate(
    stream: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, bool] = {}

    def watched(method: nn.Module, imagined: dict[str, Tensor], inputs: tuple[Tensor]) -> Tensor:
        moved.update({name: not torch.equal(value, method.get_parameter(name)) for name, value in imagined.items()})
        return functional_call(method, imagined, inputs)

    monkeypatch.setattr("mh_lightning.methods.maximally_interfered_retrieval.functional_call", watched)
    method = MaximallyInterferedRetrieval(Linear(factor=0.0), nn.Linear, 8, 2, candidates=6, optimizer=SGD)
    fit(method, stream, tmp_path)
    assert {name for name, did in moved.items() if not did} == {"backbone.slow.weight", "backbone.slow.bias"}
    assert {"head.weight", "backbone.fast.weight"} <= moved.keys()


# --- batch norm


def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_weights(images: Tensors, tmp_path: Path) -> None:
    backbone = TimmBackbone(CNN, image_size=32, frozen=False, frozen_batch_norm=True)
    before = copy.deepcopy(backbone.state_dict())
    fit(FineTuning(backbone, nn.Linear, SGD), images, tmp_path)
    buffers = {name for name, _ in backbone.named_buffers()}
    assert any(name.endswith("running_var") for name in buffers)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]) == (name in buffers), name


def test_frozen_batch_norm_in_every_mode() -> None:
    backbone = TimmBackbone(CNN, image_size=32, frozen=False, frozen_batch_norm=True)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    others = [module for module in backbone.modules() if not isinstance(module, nn.BatchNorm2d)]
    for mode in (True, False, True):
        nn.Sequential(backbone).train(mode)
        assert not any(module.training for module in norms)
        assert all(module.training == mode for module in others)
    method = FineTuning(backbone, nn.Linear)
    with method.evaluating():
        assert not any(module.training for module in backbone.modules())
    assert all(module.training for module in others) and not any(module.training for module in norms)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(x)[:1], backbone(x[:1]))  # an image's features are its own
    assert TimmBackbone(CNN, frozen=True, frozen_batch_norm=True).frozen  # agrees with what is so anyway


# --- compilation


def both(**options: Any) -> tuple[TimmBackbone, TimmBackbone]:
    """The same backbone, plain and compiled."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        made.append(TimmBackbone(VIT, image_size=32, compile=compiled, **options))
    return made[0], made[1]


@pytest.fixture
def _compiled_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch traces the model, and runs the trace as it is: no compiler, no waiting."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_features() -> None:
    plain, compiled = both()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert compiled.model._compiled_call_impl is not None and plain.model._compiled_call_impl is None


@pytest.mark.usefixtures("_compiled_without_code")
def test_compiling_changes_nothing_that_is_saved() -> None:
    plain, compiled = both(frozen=False, normalize_features=True)
    x = torch.randn(3, 3, 32, 32)
    features = compiled(x)
    torch.testing.assert_close(features, plain(x))
    features[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters())
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert described(x=plain.state_dict()) == described(x=compiled.state_dict())
    assert description_of(plain, None) == description_of(compiled, None)
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        torch.testing.assert_close(copied(x), features)
        assert copied.model._compiled_call_impl is not None


@pytest.mark.usefixtures("_compiled_without_code")
def test_compiled_in_a_run(images: Tensors, tmp_path: Path) -> None:
    weights = []
    for backbone in both(frozen=False):
        torch.manual_seed(1)
        method = FineTuning(backbone, nn.Linear, partial(torch.optim.SGD, lr=0.01))
        fit(method, images, tmp_path)
        weights.append(method.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_what_cannot_be_compiled_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    _, compiled = both()
    refused(lambda: compiled(torch.zeros(1, 3, 32, 32)), "backbone.compile=true", "'test_vit'", "leave it out")


def test_mistakes_in_a_forward_are_not_those_of_compiling() -> None:
    _, compiled = both()
    compiled.model._compiled_call_impl = compiled.model._call_impl  # type: ignore[assignment]
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)channel|size"):
        compiled(torch.zeros(1, 5, 32, 32))


# --- refusals


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"learning_rate_factor": -0.1}, ["backbone.learning_rate_factor", "at least 0", "-0.1"]),
        ({"learning_rate_factor": float("nan")}, ["backbone.learning_rate_factor", "nan"]),
        ({"learning_rate_factor": float("inf")}, ["backbone.learning_rate_factor", "inf"]),
        ({"weight_decay": -1.0}, ["backbone.weight_decay", "at least 0", "-1.0"]),
        ({"layer_decay": 0.0}, ["backbone.layer_decay", "(0, 1]", "0.0"]),
        ({"layer_decay": 1.5}, ["backbone.layer_decay", "(0, 1]", "1.5"]),
        ({"layer_decay": float("nan")}, ["backbone.layer_decay", "(0, 1]"]),
        ({"learning_rate_factor": 0.01, "frozen": True}, ["backbone.learning_rate_factor=0.01", "frozen=false"]),
        ({"weight_decay": 0.0, "frozen": True}, ["backbone.weight_decay=0.0", "frozen=false"]),
        ({"layer_decay": 0.9, "frozen": True}, ["backbone.layer_decay=0.9", "frozen=false"]),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], parts: list[str]) -> None:
    refused(lambda: TimmBackbone(CNN, **{"frozen": False, **options}), *parts)


# --- the command line

DIGITS = """
seed_everything: 3
num_threads: 1
pictures: false
model:
  class_path: mh_lightning.methods.FineTuning
  init_args:
    backbone:
      class_path: mh_lightning.backbones.TimmBackbone
      init_args: {name: test_resnet, image_size: 32, frozen: false, learning_rate_factor: 0.01, weight_decay: 0.001}
    head: {class_path: mh_lightning.MHLinear, init_args: {key_mem_units: 8, delta: 2, upd_m: WTA, upd_k: ad_hoc_WTA}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.MultiStepLR, init_args: {milestones: [1], gamma: 0.1}}
    reset_optimizer: true
data:
  class_path: mh_lightning.data.Digits
  init_args:
    {increment: 4, first_task_size: 2, epochs_per_task: 2, batch_size: 16, max_train_samples: 64, max_test_samples: 30}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A configuration that trains a tiny backbone slowly on a few digits."""
    path = tmp_path / "digits.yaml"
    path.write_text(DIGITS)
    return path


BACKBONE = "--model.init_args.backbone.init_args"
KEPT = ("--model.init_args.reset_optimizer", "false")
TOUCHED = ("--model.init_args.only_touched_units", "true")
BY_LAYER = (f"{BACKBONE}.layer_decay", "0.5", f"{BACKBONE}.frozen_batch_norm", "true")
ADAMW = ("--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", "0.01")


@pytest.mark.parametrize("options", [(), KEPT, (*KEPT, *TOUCHED), (*ADAMW, *KEPT, *BY_LAYER)])
def test_resumed_after_a_task_equals_uninterrupted(run: Run, digits: Path, options: tuple[str, ...]) -> None:
    whole = run("fit", digits, *options)
    middle = torch.load(whole / "checkpoints" / "task_2.ckpt", weights_only=True)
    rates = [group["lr"] for group in middle["optimizer_states"][0]["param_groups"]]
    assert len(rates) == (6 if BY_LAYER[0] in options else 2) and rates[1] == pytest.approx(0.01 * rates[0])
    resumed = run("fit", digits, *options, "--ckpt_path", str(whole / "checkpoints" / "task_2.ckpt"))
    assert results_of(whole) == results_of(resumed)
    weights = weights_of(resumed)
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(
        weights["backbone.model.conv1.0.weight"], middle["state_dict"]["backbone.model.conv1.0.weight"]
    )


def test_a_checkpoint_of_other_rates_is_refused(run: Run, refuses: Callable[..., str], digits: Path) -> None:
    checkpoint = ("--ckpt_path", str(run("fit", digits) / "checkpoints" / "task_1.ckpt"))
    for option, value, change in (
        ("learning_rate_factor", "0.02", "learning_rate_factor 0.01 -> 0.02"),
        ("learning_rate_factor", "1.0", "learning_rate_factor 0.01 -> 1.0"),
        ("weight_decay", "0.1", "weight_decay 0.001 -> 0.1"),
        ("layer_decay", "0.9", "layer_decay None -> 0.9"),
    ):
        sentence = refuses("fit", digits, *checkpoint, f"{BACKBONE}.{option}", value)
        assert "ckpt_path" in sentence and f"backbone.init_args.{change}" in sentence


@pytest.mark.parametrize("option", ["learning_rate_factor", "weight_decay", "layer_decay"])
def test_contradictions_get_one_sentence(refuses: Callable[..., str], digits: Path, option: str) -> None:
    text = DIGITS.replace("frozen: false, learning_rate_factor: 0.01, weight_decay: 0.001", f"{option}: 0.5")
    digits.write_text(text)
    sentence = refuses("fit", digits)
    assert f"backbone.{option}=0.5" in sentence and "frozen=false" in sentence
