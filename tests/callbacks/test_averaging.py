"""Copies of a method inside a fit of the command line, and the averages that Lightning makes of them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from mh_lightning.backbones import Identity
from mh_lightning.callbacks import TaskBoundaries
from mh_lightning.cli import main
from mh_lightning.errors import UserError
from mh_lightning.methods import FineTuning
from tests import fits
from tests.blobs import FEATURES
from tests.conftest import results_of, weights_of

Run = Callable[..., Path]
Refuses = Callable[..., str]
OPTIONS = ("--pictures", "false", "--data.init_args.batch_size", "8")
DECAY = 0.8
EMA = ("--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", f"--trainer.callbacks.decay={DECAY}")
SWA = ("--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01",
       "--trainer.callbacks.swa_epoch_start=2", "--model.init_args.reset_optimizer=false")  # fmt: skip


def given(callback: type[Callback]) -> str:
    return f"--trainer.callbacks+={__name__}.{callback.__name__}"


def last(folder: Path, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint


class Copies(Callback):
    """Copies all that takes part in a fit, twice."""

    seen: list[str] = []  # noqa: RUF012

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pickle.dumps(trainer)  # as the strategy ddp_spawn does

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch != 1:
            return
        for made in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            twin, data = made(pl_module), made(trainer.datamodule)  # type: ignore[attr-defined]
            state = pl_module.state_dict()
            assert twin.state_dict().keys() == state.keys()
            assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
            assert data.class_groups == trainer.datamodule.class_groups  # type: ignore[attr-defined]
            heads = [one._make_head(4, 3).state_dict() for one in (twin, pl_module)]  # what it is configured to make
            assert [value.shape for value in heads[0].values()] == [value.shape for value in heads[1].values()]
            if hasattr(pl_module, "replay_buffer"):
                assert len(twin.replay_buffer) == len(pl_module.replay_buffer) > 0
        self.seen.append(type(pl_module).__name__)
        trainer.should_stop = True


IMAGES = {
    "model": {"class_path": "mh_lightning.methods.ClosedForm",
              "init_args": {"head": {"class_path": "mh_lightning.heads.StreamingLinearDiscriminant"},
                            "backbone": {"class_path": "mh_lightning.backbones.TimmBackbone",
                                         "init_args": {"name": "test_resnet", "image_size": 32}}}},
    "data": {"class_path": "mh_lightning.data.Digits",
             "init_args": {"increment": 5, "max_train_samples": 60, "max_test_samples": 20}},
}  # fmt: skip


@pytest.mark.parametrize("method", ["FineTuning", "ExperienceReplay", "GDumb", "Ensemble", "ClosedForm"])
def test_copies_inside_a_fit(method: str, tiny_config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(tiny_config.read_text())
    settings["data"]["init_args"]["epochs_per_task"] = 1
    if method == "ClosedForm":  # on kept features of images
        settings |= IMAGES
        settings["data"]["init_args"]["feature_cache"] = {"folder": str(tmp_path / "features")}
    else:
        options = settings["model"]["init_args"]
        settings["model"]["class_path"] = f"mh_lightning.methods.{method}"
        if method in ("ExperienceReplay", "GDumb"):
            options["buffer_size"] = 12
        if method == "GDumb":
            del options["lr_scheduler"]
    tiny_config.write_text(yaml.safe_dump(settings))
    Copies.seen.clear()
    main(["fit", "--config", str(tiny_config), "--run_dir", str(tmp_path), "--pictures", "false", given(Copies)])
    assert Copies.seen == [method]


class Averages(Callback):
    """Averages the first head's memories and keys by hand, in the order in which they are learnt."""

    average: dict[str, Tensor] = {}  # noqa: RUF012

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name in ("head.M", "head.K"):
            value = pl_module.state_dict()[name].double()
            before = self.average.get(name, value)
            self.average[name] = DECAY * before + (1 - DECAY) * value


def test_a_running_average_is_of_weights_and_keys_and_counters_are_kept(run: Run, tiny_config: Path) -> None:
    plain = run("fit", tiny_config, *OPTIONS)
    averaged = run("fit", tiny_config, *OPTIONS, *EMA, given(Averages))
    state, current, expected = last(averaged)["state_dict"], last(averaged)["current_model_state"], weights_of(plain)
    assert all(torch.equal(value, current[name]) for name, value in expected.items())  # training is as without it
    for name in ("head.mu", "head.eta", "head.key_counter", "head.scrambling_count"):
        assert torch.equal(state[name], expected[name]) and expected[name].sum() > 0
    for name, value in Averages.average.items():
        torch.testing.assert_close(state[name].double(), value, rtol=0, atol=1e-5)
        assert not torch.allclose(state[name], expected[name], atol=1e-3)
    assert results_of(averaged)["accuracy_matrix"] != results_of(plain)["accuracy_matrix"]  # that of the average
    checkpoint = ("--ckpt_path", str(averaged / "checkpoints" / "task_1.ckpt"))
    resumed = run("fit", tiny_config, *OPTIONS, *EMA, given(Averages), *checkpoint)
    assert results_of(resumed) == results_of(averaged)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, last(averaged)[key][name]) for name, value in last(resumed)[key].items())


def test_replayed_samples_and_frozen_weights_are_no_averages(run: Run, tiny_config: Path) -> None:
    settings = yaml.safe_load(tiny_config.read_text())
    settings["model"]["class_path"] = "mh_lightning.methods.ExperienceReplay"
    settings["model"]["init_args"]["buffer_size"] = 12
    tiny_config.write_text(yaml.safe_dump(settings))
    plain, averaged = run("fit", tiny_config, *OPTIONS), run("fit", tiny_config, *OPTIONS, *EMA)
    expected = {name: value for name, value in weights_of(plain).items() if name.startswith("replay_buffer.")}
    assert len(expected) == 4 and expected["replay_buffer.targets"].max() == 5
    for name, value in expected.items():
        assert torch.equal(weights_of(averaged)[name], value), name


def test_an_average_that_has_not_begun_is_the_model(run: Run, tiny_config: Path) -> None:
    late = (*EMA, "--trainer.callbacks.update_starting_at_step=1000000")
    assert results_of(run("fit", tiny_config, *OPTIONS, *late)) == results_of(run("fit", tiny_config, *OPTIONS))


class Starts(Callback):
    """Notes the memories at the start of each epoch."""

    memories: list[Tensor] = []  # noqa: RUF012

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memories.append(pl_module.state_dict()["head.M"].clone())


def test_stochastic_weight_averaging_ends_in_the_last_checkpoint(run: Run, tiny_config: Path) -> None:
    Starts.memories.clear()
    with pytest.warns(UserWarning, match=r"last.ckpt holds the average, which `test --ckpt_path last` evaluates"):
        averaged = run("fit", tiny_config, *OPTIONS, *SWA, given(Starts))
    mean = torch.stack(Starts.memories[1:]).double().mean(dim=0)  # from the second epoch on
    final, unaveraged = weights_of(averaged), last(averaged, "task_3")["state_dict"]
    torch.testing.assert_close(final["head.M"].double(), mean, rtol=0, atol=1e-6)
    assert not torch.equal(final["head.M"], unaveraged["head.M"])
    for name in ("head.K", "head.mu", "head.eta", "head.key_counter", "head.scrambling_count"):
        assert torch.equal(final[name], unaveraged[name])
    assert yaml.safe_load((averaged / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]["device"] == (
        "cpu"
    )
    checkpoint = ("--ckpt_path", str(averaged / "checkpoints" / "task_2.ckpt"))
    resumed = run("fit", tiny_config, *OPTIONS, *SWA, given(Starts), *checkpoint)
    assert all(torch.equal(value, final[name]) for name, value in weights_of(resumed).items())
    evaluated = ("--ckpt_path", str(averaged / "checkpoints" / "last.ckpt"))
    run("test", tiny_config, *OPTIONS, *SWA, given(Starts), *evaluated)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            [*EMA, "--data.init_args.chunk_size", "16", "--data.init_args.batch_size", "8"],
            "data.chunk_size learns many",
        ),
        ([*EMA, "--trainer.precision", "bf16-true"], "trainer.precision=bf16-true would not move"),
        ([*SWA[:-1]], "reset_optimizer would undo"),
        ([*EMA, "--model", "ClosedForm"], "ClosedForm also learns outside"),
    ],
)
def test_what_would_be_no_average_is_refused(
    refuses: Refuses, tiny_config: Path, options: list[str], words: str
) -> None:
    if "--model" in options:
        settings = yaml.safe_load(tiny_config.read_text())
        parts = {"backbone": settings["model"]["init_args"]["backbone"], "head": "mh_lightning.heads.ClassMeans"}
        settings["model"] = {"class_path": options[-1], "init_args": parts}
        tiny_config.write_text(yaml.safe_dump(settings))
        options = options[:-2]
    sentence = refuses("fit", tiny_config, *options)
    assert "trainer.callbacks: " in sentence and words in sentence, sentence


def test_boundaries_come_before_averages(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", callbacks=[EMAWeightAveraging(), TaskBoundaries()], logger=False,
                      reload_dataloaders_every_n_epochs=1, max_epochs=-1, default_root_dir=tmp_path,
                      enable_checkpointing=False)  # fmt: skip
    with pytest.raises(UserError, match="EMAWeightAveraging copies the method before TaskBoundaries"):
        trainer.fit(FineTuning(Identity(FEATURES), nn.Linear), fits.stream())
