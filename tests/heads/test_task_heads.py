"""One head a task: masking, and freezing for good."""

from functools import partial

import pytest
import torch
from torch import nn

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.heads import TaskHeads, TruncatedNormalLinear

GROUPS = [[4, 0], [1, 3, 5], [2]]
FEATURES = 6
MASKED = torch.finfo(torch.float32).min / 2
memory_head = partial(
    MHLinear, key_mem_units=4, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA", scramble=True, tau_alpha=0.99, tau_eta=1
)
every_head = pytest.mark.parametrize("head", [TruncatedNormalLinear, memory_head], ids=["linear", "memory_head"])


def test_logits_stand_at_their_classes() -> None:
    heads = TaskHeads(FEATURES, GROUPS, nn.Linear)
    x = torch.randn(3, FEATURES)
    expected = torch.full((3, 6), MASKED)
    for task, group in enumerate(GROUPS):
        heads.begin_task(task)
        expected[:, group] = heads.heads[task](x)
        torch.testing.assert_close(heads(x), expected)
        alone = torch.full((3, 6), MASKED)
        alone[:, group] = expected[:, group]
        torch.testing.assert_close(heads.logits_of_task(x, task), alone)
    assert heads.classes_begun == [4, 0, 1, 3, 5, 2]


@every_head
def test_heads_of_former_tasks_stay_as_they_are_bit_for_bit(head: type[nn.Module]) -> None:
    torch.manual_seed(0)
    heads = TaskHeads(FEATURES, GROUPS, head)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    backbone = nn.Linear(FEATURES, FEATURES)  # which is tuned, so that features move
    heads.train()
    before: dict[str, torch.Tensor] = {}
    for task, group in enumerate(GROUPS):
        heads.begin_task(task)
        for _ in range(5):
            optimizer.zero_grad()
            features = backbone(torch.randn(8, FEATURES))
            # all heads take part, and none but the current one may change
            (heads(features)[:, group].square().sum() + sum(part.sum() for part in heads.logits_by_task(features))
             ).backward()  # fmt: skip
            optimizer.step()
        state = heads.state_dict()
        for name, value in before.items():
            assert torch.equal(state[name], value), name
        changed = {name: value.clone() for name, value in state.items() if name.startswith(f"heads.{task}.")}
        assert all(parameter.grad is None for one in heads.heads[:task] for parameter in one.parameters())
        before |= changed
    if head is memory_head:
        assert all(int(one.key_counter.sum()) == 80 and one.scrambling_count > 0 for one in heads.heads)  # type: ignore[union-attr, arg-type, operator]


def test_gradients_of_the_last_step_are_not_stepped_again() -> None:
    heads = TaskHeads(FEATURES, GROUPS)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9)
    heads(torch.randn(4, FEATURES))[:, 0].sum().backward()
    before = heads.heads[0].weight.detach().clone()
    heads.begin_task(1)
    optimizer.step()
    assert torch.equal(heads.heads[0].weight, before)


def test_a_new_stream_can_begin() -> None:
    heads = TaskHeads(FEATURES, GROUPS)
    heads.begin_task(2)
    heads.begin_task(0)
    assert all(parameter.requires_grad for parameter in heads.parameters())
    assert heads.classes_begun == [4, 0]


def test_tasks_begun_are_part_of_the_state() -> None:
    heads, other = TaskHeads(FEATURES, GROUPS), TaskHeads(FEATURES, GROUPS)
    heads.begin_task(1)
    other.load_state_dict(heads.state_dict())
    x = torch.randn(2, FEATURES)
    assert torch.equal(heads(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masked_logits_are_finite_in_every_type(dtype: torch.dtype) -> None:
    logits = TaskHeads(FEATURES, GROUPS).to(dtype)(torch.randn(2, FEATURES, dtype=dtype))
    assert logits.dtype == dtype and bool(logits.isfinite().all())
    assert set(logits.argmax(dim=1).tolist()) <= {4, 0}


def test_heads_start_as_published() -> None:
    layer = TruncatedNormalLinear(500, 200)
    assert not layer.bias.any() and layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert "bias=True" in repr(layer)


@pytest.mark.parametrize("groups", [[[0, 1], [1, 2]], [[0], [5]], [], [[0], []]], ids=str)
def test_groups_must_hold_each_class_once(groups: list[list[int]]) -> None:
    with pytest.raises(UserError, match="class_groups must hold each class from 0 on once"):
        TaskHeads(FEATURES, groups)


def test_a_deviation_that_is_not_positive() -> None:
    with pytest.raises(UserError, match=r"std must be above 0, got 0\.0"):
        TruncatedNormalLinear(2, 2, std=0.0)
