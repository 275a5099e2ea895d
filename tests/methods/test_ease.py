"""EASE, against its formulas."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn import functional as F

import mh_lightning
from mh_lightning.backbones import Adapters, LoRA, TimmBackbone
from mh_lightning.errors import UserError
from mh_lightning.methods import EASE
from tests.methods.test_prompting import QUIET, images, stream


def method(name: str = "test_vit", **options: Any) -> EASE:
    seed_everything(0)
    backbone = TimmBackbone(name, image_size=32, peft=Adapters(bottleneck=4, scale=1.0))
    return EASE(
        backbone, nn.Linear, **{"optimizer": partial(torch.optim.Adam, lr=0.01), "reset_optimizer": True, **options}
    )


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_ease_by_hand(name: str, tmp_path: Path) -> None:
    spaces: list[TimmBackbone] = []

    class Watched(EASE):
        def on_task_end(self, task: int) -> None:
            super().on_task_end(task)
            space = TimmBackbone(name, image_size=32, peft=Adapters(bottleneck=4, scale=1.0))
            space.load_state_dict(self.backbone.state_dict())
            spaces.append(space.eval())

    seed_everything(0)
    backbone = TimmBackbone(name, image_size=32, peft=Adapters(bottleneck=4, scale=1.0))
    found = Watched(backbone, nn.Linear, alpha=0.3, optimizer=partial(torch.optim.Adam, lr=0.01), reset_optimizer=True)
    data = stream(epochs_per_task=2)
    results = mh_lightning.fit(found, data, run_dir=tmp_path, **QUIET)
    assert results["task_incremental_accuracy"] > 0.5 and len(spaces) == 2
    x, labels = (torch.cat(parts) for parts in list(zip(*data.test_dataloader()[0], strict=True))[:2])
    with torch.no_grad():
        features = [space(x) for space in spaces]  # the training samples are those of the test
        means = [torch.stack([part[labels == label].mean(dim=0) for label in range(4)]) for part in features]
        prototypes = torch.stack(means, dim=1)
        for label in (0, 1):  # in the second space from what the new classes are like in the first
            similar = torch.stack([F.cosine_similarity(means[0][label], means[0][new], dim=0) for new in (2, 3)])
            prototypes[label, 1] = (similar.softmax(dim=0)[:, None] * means[1][2:]).sum(dim=0)
        torch.testing.assert_close(found.prototypes, prototypes, rtol=1e-3, atol=1e-4)
        expected = torch.zeros(len(x), 4)
        for label in range(4):
            for space in range(2):
                weight = 1.0 if label // 2 == space else 0.3
                cosine = F.cosine_similarity(features[space], prototypes[label, space][None], dim=1)
                expected[:, label] += 10 * weight * cosine
        torch.testing.assert_close(found.eval()(x), expected, rtol=1e-3, atol=1e-3)
    assert (expected.argmax(dim=1) == labels).float().mean() == pytest.approx(results["last_accuracy"])


def test_each_task_begins_with_adapters_that_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found, x = method(), images()
    plain = found.backbone(x).detach()
    starts: list[torch.Tensor] = []
    original = found.on_task_start

    def begin(task: int) -> None:
        original(task)
        starts.append(found.backbone(x).detach())

    found.on_task_start = begin  # type: ignore[method-assign]
    mh_lightning.fit(found, stream(), run_dir=tmp_path, **QUIET)
    for start in starts:
        torch.testing.assert_close(start, plain)
    assert len(starts) == 2 and not torch.allclose(found.backbone(x), plain, atol=1e-3)


def test_comes_back_and_goes_on(tmp_path: Path) -> None:
    first = method()
    results = mh_lightning.fit(first, stream(epochs_per_task=2), run_dir=tmp_path, **QUIET)
    resumed = method()
    checkpoint = results.folder / "checkpoints" / "task_1.ckpt"
    mh_lightning.fit(resumed, stream(epochs_per_task=2), run_dir=tmp_path, ckpt_path=checkpoint, **QUIET)
    for entry, value in first.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[entry]), entry
    pixels = stream().load().train.inputs.numpy()
    loaded = mh_lightning.load(results.folder)
    right = loaded.predict(pixels).probabilities.argmax(axis=1) == np.repeat(np.arange(4), 8)
    assert right.mean() == pytest.approx(results["last_accuracy"])
    seed_everything(0)
    more = stream(class_names=["a", "b", "c", "d"])
    mh_lightning.fit(loaded.method, more, run_dir=tmp_path, experiment="more", **QUIET)
    assert loaded.method.task_of_class.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    again = mh_lightning.load(tmp_path / "more" / "version_0")
    np.testing.assert_array_equal(again.predict(pixels).probabilities, loaded.predict(pixels).probabilities)


def test_refusals(tmp_path: Path) -> None:
    for peft in (None, LoRA()):
        with pytest.raises(UserError, match="EASE trains adapters; give a TimmBackbone with peft: Adapters"):
            EASE(TimmBackbone("test_vit", image_size=32, peft=peft), nn.Linear)
    with pytest.raises(UserError, match="alpha must"):
        method(alpha=-1.0)
    domains = torch.arange(32) % 2
    data = stream(scenario="DI", domain_train=domains, domain_test=domains, increment=4)
    with pytest.raises(UserError, match="each class must belong to one task"):
        mh_lightning.fit(method(), data, run_dir=tmp_path, **QUIET)
