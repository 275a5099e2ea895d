"""Learning without forgetting, dark experience replay, iCaRL and weight aligning, against their formulas."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import MHLinear
from mh_lightning.backbones import Identity, LoRA, TimmBackbone
from mh_lightning.errors import UserError
from mh_lightning.methods import DER, ERACE, DERPlusPlus, ExperienceReplay, ICaRL, LwF, WeightAligning
from mh_lightning.methods.dark_experience_replay import LogitsBuffer, distances
from mh_lightning.methods.icarl import _chosen, herd
from mh_lightning.methods.weight_aligning import weights_of_classes
from tests.methods.test_rivals import FEATURES, accuracies, fit, linear, sgd, stream


def softened(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).softmax(dim=1)


# --- learning without forgetting


def test_the_loss_of_forgetting(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(LwF):
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            loss, logits = super().training_loss(batch)
            plain = F.cross_entropy(logits, batch[1])
            if self.teacher is None:
                torch.testing.assert_close(loss, plain)
            else:
                told = softened(self.teacher["head"](batch[0])[:, :2], 3.0)
                now = softened(logits[:, :2], 3.0)
                forgotten = 9 * (told * (told / now).log()).sum(dim=1).mean()
                torch.testing.assert_close(loss, plain + 0.5 * forgotten, rtol=1e-4, atol=1e-6)
                seen.append(float(forgotten.detach()))
            return loss, logits

        def on_task_end(self, task: int) -> None:
            super().on_task_end(task)
            assert self.teacher is not None and self.head is not None
            assert torch.equal(self.teacher["head"].weight, self.head.weight)  # type: ignore[arg-type]

    fit(Watched(Identity(FEATURES), linear, distillation=0.5, temperature=3.0, optimizer=sgd), tmp_path)
    assert seen[0] == pytest.approx(0, abs=1e-6) and max(seen) > 0.01 and len(seen) == 20


def test_a_teacher_of_a_trained_backbone_has_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = nn.Linear(FEATURES, 3)
    method = LwF(backbone, linear, optimizer=sgd)
    fit(method, tmp_path)
    assert method.teacher is not None
    x = torch.randn(5, FEATURES)
    told = method.told(x, method.features(x))
    assert torch.equal(told, method(x))  # the last task has just ended
    with torch.no_grad():
        for parameter in method.trained_parameters().values():
            parameter.add_(1)
    assert torch.equal(method.told(x, method.features(x)), told)
    method.train()
    assert not any(module.training for module in method.teacher.modules())


def test_distillation_keeps_answers(tmp_path: Path) -> None:
    changes: list[float] = []

    class Watched(LwF):
        def on_task_end(self, task: int) -> None:
            if self.teacher is not None:
                x = self.stream._splits["train"].features
                told = softened(self.teacher["head"](x)[:, :2], 1.0)
                changes.append(float((softened(self(x)[:, :2], 1.0) - told).abs().mean().detach()))
            super().on_task_end(task)

    for weight in (0.0, 1.0):
        fit(Watched(Identity(FEATURES), linear, distillation=weight, optimizer=sgd), tmp_path)
    assert changes[1] < 0.6 * changes[0]


# --- experience replay with other losses


def test_asymmetric_cross_entropy_is_replay_among_the_classes_of_the_batch(tmp_path: Path) -> None:
    options = {"buffer_size": 8, "replay_batch_size": 3, "optimizer": sgd}
    heads = []
    for method in (
        ERACE(Identity(FEATURES), linear, **options),
        ExperienceReplay(Identity(FEATURES), linear, classes_in_loss="batch", **options),
        ExperienceReplay(Identity(FEATURES), linear, **options),
    ):
        fit(method, tmp_path, stream(batch_size=2))
        assert method.head is not None
        heads.append(method.head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind", [DER, DERPlusPlus])
def test_logits_are_remembered(kind: Any, tmp_path: Path) -> None:
    answered: dict[tuple[float, ...], Tensor] = {}
    differences: list[float] = []

    class Watched(kind):  # type: ignore[misc]
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            assert self.replay_buffer is not None and self.head is not None
            first, second = (self.replay_buffer.draw(3, turn=turn) for turn in (0, 1))
            expected = F.cross_entropy(self.head(batch[0]), batch[1])
            if first is not None:
                for row, logits in zip(first[0], first[3], strict=True):
                    assert torch.equal(answered[tuple(row.tolist())], logits)
                expected = expected + 0.4 * F.mse_loss(self.head(first[0]), first[3])
                if kind is DERPlusPlus:
                    expected = expected + 0.6 * F.cross_entropy(self.head(second[0]), second[1])
                    differences.append(float((first[0].sort(dim=0).values - second[0].sort(dim=0).values).norm())
                                       if len(first[0]) == 3 else 0.0)  # fmt: skip
            loss, logits = super().training_loss(batch)
            torch.testing.assert_close(loss, expected)
            answered.update((tuple(row.tolist()), one.detach()) for row, one in zip(batch[0], logits, strict=True))
            return loss, logits

    weights = {"alpha": 0.4} | ({"beta": 0.6} if kind is DERPlusPlus else {})
    method = Watched(Identity(FEATURES), linear, buffer_size=8, replay_batch_size=3, optimizer=sgd, **weights)
    fit(method, tmp_path, stream(batch_size=2))
    assert method.replay_buffer is not None and method.replay_buffer.seen == 40
    if kind is DERPlusPlus:
        assert max(differences) > 0  # other samples for the classes


def test_every_epoch_is_offered(tmp_path: Path) -> None:
    method = DER(Identity(FEATURES), linear, buffer_size=8, optimizer=sgd)
    fit(method, tmp_path, stream(epochs_per_task=3))
    assert method.replay_buffer is not None and method.replay_buffer.seen == 3 * 40


def test_classes_that_were_not_known_do_not_count() -> None:
    buffer = LogitsBuffer(3, num_classes=2)
    buffer.add(torch.ones(2, 1), torch.tensor([0, 1]), torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    buffer.grow(3)
    drawn = buffer.draw(2)
    assert drawn is not None and drawn[3].shape == (2, 3)
    logits = torch.tensor([[0.0, 0.0, 9.0]], requires_grad=True)
    found = distances(logits, torch.tensor([[1.0, 3.0, torch.nan]]))
    assert found.tolist() == [5.0]
    found.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [[-1.0, -3.0, 0.0]]


def test_dark_replay_keeps_what_fine_tuning_forgets(tmp_path: Path) -> None:
    matrix = accuracies(DERPlusPlus(Identity(FEATURES), linear, buffer_size=20, optimizer=sgd), tmp_path)
    assert matrix[1, 0] == 1


# --- iCaRL


def test_herding_by_trying_all() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(12, 3, generator=generator)
    chosen: list[int] = []
    for _ in range(5):
        left = [place for place in range(12) if place not in chosen]
        errors = [float((features[[*chosen, place]].mean(dim=0) - features.mean(dim=0)).norm()) for place in left]
        chosen.append(left[min(range(len(left)), key=errors.__getitem__)])
    assert herd(features, 5) == chosen
    assert sorted(herd(features, 99)) == [*range(12)]


def test_icarl_by_hand(tmp_path: Path) -> None:
    losses: list[float] = []

    class Watched(ICaRL):
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            assert self.replay_buffer is not None and self.head is not None
            drawn = self.replay_buffer.draw(self.replay_batch_size)
            x, y = batch[0], batch[1]
            if drawn is not None:
                x, y = torch.cat([x, drawn[0]]), torch.cat([y, drawn[1]])
            classes = 2 * (self.task + 1)
            wanted = F.one_hot(y, 4).float()
            if self.teacher is not None:
                wanted[:, :2] = self.teacher["head"](x)[:, :2].sigmoid()
            g = self.head(x).sigmoid()
            terms = wanted * g.log() + (1 - wanted) * (1 - g).log()
            expected = -terms[:, :classes].sum(dim=1).mean()
            loss, logits = super().training_loss(batch)
            torch.testing.assert_close(loss, expected)
            losses.append(float(expected.detach()))
            return loss, logits

    method = Watched(Identity(FEATURES), linear, buffer_size=10, replay_batch_size=4, optimizer=sgd)
    data = stream(batch_size=2)
    fit(method, tmp_path, data)
    assert len(losses) == 20 and method.replay_buffer is not None
    inputs, classes, tasks = method.replay_buffer.content()
    assert torch.bincount(classes).tolist() == [2, 2, 2, 2]  # 10 // 4 of each
    assert tasks.tolist() == [label // 2 for label in classes.tolist()]
    samples = data._splits["train"]
    assert samples.features is not None
    for label in range(4):
        own = samples.features[torch.from_numpy(samples.labels) == label]
        kept = herd(F.normalize(own, dim=1), 5 if label < 2 else 2)[:2]  # of two classes, each had five at first
        assert torch.equal(inputs[classes == label], own[kept])
    method.eval()
    means = torch.stack([F.normalize(inputs[classes == label], dim=1).mean(dim=0) for label in range(4)])
    x = torch.randn(50, FEATURES, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(F.normalize(x, dim=1), means).argmin(dim=1)
    assert torch.equal(method(x).argmax(dim=1), nearest)
    assert torch.equal(method.answering_head()(x).argmax(dim=1), nearest)
    assert not torch.equal(method.head(x).argmax(dim=1), nearest)


def test_exemplars_of_classes_that_come_again(tmp_path: Path) -> None:
    domains = torch.arange(40) % 2
    labels = torch.arange(40) // 2 % 4
    x = 2 + 3 * torch.eye(FEATURES)[labels] + domains.unsqueeze(1)
    data = stream()
    data = type(data)(x, labels, x, labels, scenario="DI", domain_train=domains, domain_test=domains, increment=4,
                      batch_size=5)  # fmt: skip
    method = ICaRL(Identity(FEATURES), linear, buffer_size=16, optimizer=sgd)
    fit(method, tmp_path, data)
    assert method.replay_buffer is not None
    _, classes, tasks = method.replay_buffer.content()
    assert torch.bincount(classes).tolist() == [4, 4, 4, 4]
    assert all((tasks[classes == label] == 0).sum() == 2 for label in range(4))


def test_icarl_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="buffer_size=41: the stream has 40 training samples"):
        fit(ICaRL(Identity(FEATURES), linear, buffer_size=41, optimizer=sgd), tmp_path)
    for options in ({"loss": "hinge"}, {"classes_in_loss": "batch"}):
        with pytest.raises(UserError, match="ICaRL has a loss of its own"):
            ICaRL(Identity(FEATURES), linear, buffer_size=4, **options)


# --- weight aligning


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_weights_of_a_class_in_all_units(shared_keys: bool, bias: bool) -> None:
    torch.manual_seed(2)
    head = MHLinear(FEATURES, 3, bias, key_mem_units=5, delta=2, shared_keys=shared_keys).eval()
    weights = weights_of_classes(head)
    assert weights.shape == (3, 5, FEATURES)
    x = torch.randn(6, FEATURES)
    with torch.no_grad():
        before = head(x)
        weights[1] = 0
        after = head(x)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, 1], before[:, 1])
    if not bias:
        assert not bool(after[:, 1].any())


def test_aligned_norms_and_the_loss(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(WeightAligning):
        def training_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
            assert self.replay_buffer is not None and self.head is not None
            drawn = self.replay_buffer.draw(self.replay_batch_size)
            x, y = batch[0], batch[1]
            if drawn is not None:
                x, y = torch.cat([x, drawn[0]]), torch.cat([y, drawn[1]])
            logits = self.head(x)
            expected = F.cross_entropy(logits, y)
            if self.teacher is not None:
                told, now = softened(self.teacher["head"](x)[:, :2], 2.0), softened(logits[:, :2], 2.0)
                forgotten = 4 * (told * (told / now).log()).sum(dim=1).mean()
                expected = 0.5 * expected + 0.5 * forgotten  # two of four classes are old
                seen.append(float(forgotten.detach()))
            loss, found = super().training_loss(batch)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
            return loss, found

    method = Watched(Identity(FEATURES), linear, buffer_size=8, replay_batch_size=3, optimizer=sgd)
    fit(method, tmp_path, stream(batch_size=2))
    assert method.head is not None and len(seen) == 10
    norms = method.head.weight.detach().norm(dim=1)
    torch.testing.assert_close(norms[:2].mean(), norms[2:].mean())


def test_weight_aligning_needs_weights_of_classes(tmp_path: Path) -> None:
    def head(features: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(features, classes))

    with pytest.raises(UserError, match="which ones these are in a Sequential is not known"):
        fit(WeightAligning(Identity(FEATURES), head, buffer_size=8, optimizer=sgd), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(LwF, distillation=-1.0), "distillation must be"),
        (partial(LwF, temperature=0.0), "temperature must be"),
        (partial(DER, buffer_size=4, alpha=-0.1), "alpha must be"),
        (partial(DERPlusPlus, buffer_size=4, beta=-0.1), "beta must be"),
        (partial(WeightAligning, buffer_size=4, temperature=-2.0), "temperature must be"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(Identity(FEATURES), nn.Linear)


def domains(**options: Any) -> Any:
    """The four classes in two domains."""
    labels = torch.arange(40) // 2 % 4
    shift = torch.arange(40) % 2
    x = 2 + 3 * torch.eye(FEATURES)[labels] + shift.unsqueeze(1)
    return type(stream())(x, labels, x, labels, **{"scenario": "DI", "domain_train": shift, "domain_test": shift,
                          "increment": 4, "batch_size": 5} | options)  # fmt: skip


def test_classes_that_come_again_are_learnt_by_weight_aligning(tmp_path: Path) -> None:
    heads: list[Tensor] = []

    class Watched(WeightAligning):
        def on_task_end(self, task: int) -> None:
            super().on_task_end(task)
            assert self.head is not None
            heads.append(self.head.weight.detach().clone())

    fit(Watched(Identity(FEATURES), linear, buffer_size=8, optimizer=sgd), tmp_path, domains())
    assert (heads[1] - heads[0]).abs().max() > 1e-3


@pytest.mark.parametrize("places", [4, 6, 7, 9])
def test_places_of_classes_from_several_tasks(places: int) -> None:
    features = F.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    classes = torch.tensor([0] * 8 + [1] * 4 + [0] * 4 + [1] * 4)  # twelve new, eight kept
    tasks = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1])
    each = places // 2
    chosen = _chosen(features, classes, tasks, each)
    assert len({*chosen.tolist()}) == len(chosen)
    for label in (0, 1):
        own = [place for place in chosen if classes[place] == label]
        of_task = [-1 if place < 12 else int(tasks[place - 12]) for place in own]
        parts = [of_task.count(task) for task in (-1, 0, 1)]
        assert len(own) == each and max(parts) - min(parts) <= 1


def test_no_class_loses_all_its_exemplars(tmp_path: Path) -> None:
    method = ICaRL(Identity(FEATURES), linear, buffer_size=4, replay_batch_size=4, optimizer=sgd)
    fit(method, tmp_path, domains())
    assert method.replay_buffer is not None and method.replay_buffer.content()[1].tolist() == [0, 1, 2, 3]


def test_a_teacher_keeps_what_is_trained_alone(tmp_path: Path) -> None:
    body = TimmBackbone("test_resnet", image_size=32, peft=LoRA(rank=2))
    method = LwF(body, nn.Linear, optimizer=sgd)
    x = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    data = type(stream())(x, torch.arange(8) % 4, x, torch.arange(8) % 4, increment=2, batch_size=4)
    fit(method, tmp_path, data)
    assert method.teacher is not None
    kept = sum(value.numel() for value in method.teacher["backbone"].state_dict().values())
    trained = sum(one.numel() for one in body.parameters() if one.requires_grad)
    buffers = sum(one.numel() for one in body.buffers())
    assert kept == trained + buffers
    pictures = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(method.told(pictures, body(pictures)), method.eval()(pictures))
