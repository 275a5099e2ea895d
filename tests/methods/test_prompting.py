"""Prompted transformers: L2P, DualPrompt and CODA-Prompt, each against a slow version of its formulas."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

import mh_lightning
from mh_lightning.backbones import Identity, LoRA, TimmBackbone, VisualPrompts
from mh_lightning.backbones.vit_tokens import embedded, pooled, with_prefix
from mh_lightning.data import Tensors
from mh_lightning.data.features import FeatureCache
from mh_lightning.errors import UserError
from mh_lightning.methods import L2P, CODAPrompt, DualPrompt
from mh_lightning.methods.prompting import PromptMethod

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "pictures": False,
         "accelerator": "cpu"}  # fmt: skip
OPTIONS: dict[str, tuple[type[PromptMethod], dict[str, Any]]] = {
    "L2P": (L2P, {"pool_size": 4, "length": 2, "top_k": 3}),
    "DualPrompt": (
        DualPrompt,
        {"general_layers": (0,), "expert_layers": (1, 3), "general_length": 2, "expert_length": 3},
    ),
    "CODAPrompt": (CODAPrompt, {"layers": (0, 2), "components": 3, "length": 4}),
}


def stream(**options: Any) -> Tensors:
    """Four classes of images that differ in the colour of noise."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 8)
    means = np.array([[170, 110, 110], [110, 170, 110], [110, 110, 170], [150, 150, 80]])
    pixels = means[labels][:, None, None] + generator.normal(0, 30, (32, 32, 32, 3))
    x, y = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)
    return Tensors(x, y, x, y, **{"increment": 2, "batch_size": 4} | options)


def method(name: str, **options: Any) -> PromptMethod:
    seed_everything(0)
    kind, own = OPTIONS[name]
    adam = partial(torch.optim.Adam, lr=0.01)
    backbone = TimmBackbone("test_vit", image_size=32)
    return kind(backbone, nn.Linear, **{"optimizer": adam, "classes_in_loss": "task", **own, **options})


def made(name: str, tasks: int = 3, **options: Any) -> PromptMethod:
    """A method with parts, outside of a trainer, whose images are (b, 3, 32, 32)."""
    from mh_lightning.data.learnt_stream import LearntStream

    found = method(name, **options)
    found.learnt_stream = LearntStream(
        [str(label) for label in range(2 * tasks)], [[2 * t, 2 * t + 1] for t in range(tasks)]
    )
    found.make_parts()
    return found


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_steps_of_a_transformer_and_a_prefix() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    x = images()
    tokens = embedded(model, x)
    none = torch.zeros(len(x), 0, tokens.shape[2])
    plain = tokens
    for block in model.blocks:
        tokens, plain = with_prefix(block, tokens, none, none), block(plain)
        torch.testing.assert_close(tokens, plain)
    torch.testing.assert_close(pooled(model, tokens), model(x))
    # one more key and value, by hand
    block, tokens = model.blocks[0], embedded(model, x)
    keys, values = torch.randn(2, len(x), 1, tokens.shape[2])
    y = block.norm1(tokens)
    q, k, v = block.attn.qkv(y).chunk(3, dim=2)
    k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
    heads, found = block.attn.num_heads, []
    for a, b, c in zip(*(one.chunk(heads, dim=2) for one in (q, k, v)), strict=True):
        found.append(torch.softmax(a @ b.transpose(1, 2) / a.shape[2] ** 0.5, dim=2) @ c)
    tokens_after = tokens + block.ls1(block.attn.proj(torch.cat(found, dim=2)))
    expected = tokens_after + block.ls2(block.mlp(block.norm2(tokens_after)))
    torch.testing.assert_close(with_prefix(block, tokens, keys, values), expected, rtol=1e-4, atol=1e-5)


def test_l2p_by_hand() -> None:
    found = made("L2P", pull=0.3)
    vit, pool, x = found.transformer, found.prompts, images()
    query = found.query(x)
    torch.testing.assert_close(query, vit(x))
    features, losses = found.prompted(x, query)
    for row in range(len(x)):
        cosines = [float(F.cosine_similarity(query[row], key, dim=0)) for key in pool.keys]  # type: ignore[union-attr]
        best = sorted(range(4), key=lambda place: -cosines[place])[:3]
        prompts = torch.cat([pool.prompts[place] for place in best])  # type: ignore[union-attr,index]
        tokens = embedded(vit, x[row : row + 1])
        tokens = vit.norm(vit.blocks(torch.cat([tokens[:, :1], prompts[None], tokens[:, 1:]], dim=1)))
        torch.testing.assert_close(features[row], tokens[0, 1:7].mean(dim=0), rtol=1e-4, atol=1e-5)
        assert float(losses[row]) == pytest.approx(-0.3 * sum(cosines[place] for place in best), abs=1e-5)


def test_dual_prompt_by_hand() -> None:
    found = made("DualPrompt", pull=0.7)
    vit, prompts, x = found.transformer, found.prompts, images()
    found.tasks_begun.fill_(2)
    query = found.query(x)

    def expected(row: int, task: int) -> Tensor:
        tokens = embedded(vit, x[row : row + 1])
        for place, block in enumerate(vit.blocks):
            if place == 0:
                tokens = with_prefix(block, tokens, *(one[None] for one in prompts.general[0]))  # type: ignore[union-attr,index]
            elif place in (1, 3):
                expert = prompts.experts[task][(1, 3).index(place)]  # type: ignore[union-attr,index]
                tokens = with_prefix(block, tokens, expert[:1], expert[1:])
            else:
                tokens = block(tokens)
        return pooled(vit, tokens)[0]

    found.train()
    features, losses = found.prompted(x, query)
    for row in range(len(x)):
        torch.testing.assert_close(features[row], expected(row, task=1), rtol=1e-4, atol=1e-5)
        cosine = F.cosine_similarity(query[row], prompts.keys[1], dim=0)  # type: ignore[union-attr,index]
        assert float(losses[row]) == pytest.approx(-0.7 * float(cosine), abs=1e-5)
    found.eval()
    with torch.no_grad():  # of the third task nothing is known yet, however near its key
        prompts.keys[2].copy_(query[0])  # type: ignore[union-attr,index,operator]
    features, _ = found.prompted(x, query)
    for row in range(len(x)):
        cosines = [float(F.cosine_similarity(query[row], prompts.keys[task], dim=0)) for task in range(2)]  # type: ignore[union-attr,index]
        torch.testing.assert_close(features[row], expected(row, cosines.index(max(cosines))), rtol=1e-4, atol=1e-5)


def test_coda_prompt_by_hand() -> None:
    found = made("CODAPrompt", orthogonal=0.2)
    vit, parts, x = found.transformer, found.prompts, images()
    with torch.no_grad():
        for one in parts.parameters():  # type: ignore[union-attr]
            one.add_(0.1 * torch.randn_like(one))
    found.tasks_begun.fill_(2)
    query = found.query(x)
    features, losses = found.prompted(x, query)
    stacked = [torch.cat([*kind][:2], dim=1) for kind in (parts.prompts, parts.keys, parts.attention)]  # type: ignore[union-attr,misc]
    for row in range(len(x)):
        tokens = embedded(vit, x[row : row + 1])
        for place, block in enumerate(vit.blocks):
            if place not in (0, 2):
                tokens = block(tokens)
                continue
            prompts, keys, attention = (one[(0, 2).index(place)] for one in stacked)
            weights = [F.cosine_similarity(query[row] * a, k, dim=0) for a, k in zip(attention, keys, strict=True)]
            prefix = sum(weight * prompt for weight, prompt in zip(weights, prompts, strict=True))
            tokens = with_prefix(block, tokens, prefix[None, :2], prefix[None, 2:])
        torch.testing.assert_close(features[row], pooled(vit, tokens)[0], rtol=1e-4, atol=1e-5)
    terms = [(rows.flatten(1) @ rows.flatten(1).T - torch.eye(6)).square().mean() for kind in stacked for rows in kind]
    torch.testing.assert_close(losses, 0.2 * torch.stack(terms).sum().expand(len(x)))
    features.sum().backward()
    learns = [one.grad is not None for one in parts.prompts]  # type: ignore[union-attr]
    assert learns == [False, True, False]  # that of the task alone
    fresh = made("CODAPrompt")
    every = torch.cat([*fresh.prompts.keys], dim=1)  # type: ignore[union-attr,misc]
    torch.testing.assert_close(every @ every.transpose(1, 2), torch.eye(9).expand(2, 9, 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_learns_prompts_alone_and_comes_back(name: str, tmp_path: Path) -> None:
    first = method(name)
    own = {one: value.clone() for one, value in first.backbone.state_dict().items()}
    results = mh_lightning.fit(first, stream(epochs_per_task=2), run_dir=tmp_path, **QUIET)
    assert all(torch.equal(value, own[one]) for one, value in first.backbone.state_dict().items())
    assert results["task_incremental_accuracy"] > 0.5
    resumed = method(name)
    checkpoint = results.folder / "checkpoints" / "task_1.ckpt"
    mh_lightning.fit(resumed, stream(epochs_per_task=2), run_dir=tmp_path, ckpt_path=checkpoint, **QUIET)
    for entry, value in first.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[entry]), entry
    pixels = stream().load().train.inputs.numpy()
    loaded = mh_lightning.load(results.folder)
    right = loaded.predict(pixels).probabilities.argmax(axis=1) == np.repeat(np.arange(4), 8)
    assert right.mean() == pytest.approx(results["last_accuracy"])
    with pytest.raises(UserError, match="cannot be exported"):
        loaded.method.answering_head()
    # further classes, with prompts of further tasks
    more = stream(class_names=["a", "b", "c", "d"])
    seed_everything(0)
    mh_lightning.fit(loaded.method, more, run_dir=tmp_path, experiment="more", **QUIET)
    assert int(loaded.method.tasks_begun) == 4 and loaded.method.head.out_features == 8
    again = mh_lightning.load(tmp_path / "more" / "version_0")
    np.testing.assert_array_equal(again.predict(pixels).probabilities, loaded.predict(pixels).probabilities)
    assert json.loads((tmp_path / "more" / "version_0" / "results.json").read_text())["parent"]["from"]


def test_prompts_of_earlier_tasks_stay(tmp_path: Path) -> None:
    for name in ("DualPrompt", "CODAPrompt"):
        found = method(name)
        kept: list[dict[str, Tensor]] = []
        original = found.on_task_start

        def note(task: int, found: Any = found, kept: Any = kept, original: Any = original) -> None:
            kept.append({one: value.clone() for one, value in found.prompts.state_dict().items()})
            original(task)

        found.on_task_start = note  # type: ignore[method-assign]
        mh_lightning.fit(found, stream(), run_dir=tmp_path, experiment=name, **QUIET)
        after = found.prompts.state_dict()  # type: ignore[union-attr]
        first = [one for one in after if one.endswith(".0")]
        assert first and all(torch.equal(kept[1][one], after[one]) for one in first)
        assert not all(torch.equal(kept[0][one], after[one]) for one in first)


def test_refusals(tmp_path: Path) -> None:
    vit = partial(TimmBackbone, "test_vit", image_size=32)
    for backbone, message in (
        (Identity(4), "L2P prompts the tokens of a vision transformer, and this backbone has none"),
        (TimmBackbone("test_resnet", image_size=32), "this backbone has none"),
        (vit(frozen=False), "prompts a frozen backbone"),
        (vit(peft=LoRA()), "prompts a frozen backbone"),
    ):
        with pytest.raises(UserError, match=message):
            L2P(backbone, nn.Linear)
    for kind, options, message in (
        (L2P, {"top_k": 11}, "top_k must"),
        (L2P, {"pool_size": 0}, "pool_size must"),
        (DualPrompt, {"expert_layers": (1, 2)}, "general_layers and expert_layers=.* each once"),
        (CODAPrompt, {"layers": (0, 99)}, "the transformer has the blocks 0 to"),
        (CODAPrompt, {"length": 5}, "length=5 must be even"),
    ):
        with pytest.raises(UserError, match=message):
            kind(vit(), nn.Linear, **options)
    cache = FeatureCache(folder=tmp_path / "features")
    with pytest.raises(UserError, match=r"data.feature_cache: L2P prompts the backbone with each image"):
        mh_lightning.fit(method("L2P"), stream(feature_cache=cache), run_dir=tmp_path, **QUIET)
    with pytest.raises(UserError, match="DualPrompt needs the borders of tasks"):
        mh_lightning.fit(method("DualPrompt"), stream(announces_tasks=False), run_dir=tmp_path, **QUIET)
    mh_lightning.fit(method("L2P", classes_in_loss="all"), stream(announces_tasks=False), run_dir=tmp_path, **QUIET)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", ["test_vit", "test_vit2"])  # of which the second averages tokens, and normalises then
def test_features_are_as_the_backbone_gives_them(name: str, model: str) -> None:
    kind, own = OPTIONS[name]
    found = kind(TimmBackbone(model, image_size=32, normalize_features=True), nn.Linear, **own)
    found.prompts, x = found.make_prompts(1), images()
    features, _ = found.prompted(x, found.query(x))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(x)))
    plain = kind(TimmBackbone(model, image_size=32), nn.Linear, **own)
    plain.prompts = plain.make_prompts(1)
    features, _ = plain.prompted(x, plain.query(x))
    if (name, model) != ("L2P", "test_vit"):  # which is a mean of tokens after the LayerNorm
        torch.testing.assert_close(features.std(dim=1), torch.ones(len(x)), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_more_of_the_same_classes(name: str, tmp_path: Path) -> None:
    found = method(name)
    for _ in range(2):
        mh_lightning.fit(found, stream(), run_dir=tmp_path, **QUIET)
    assert int(found.tasks_begun) == 4


def test_a_run_that_was_cut_short_does_not_go_on(tmp_path: Path) -> None:
    results = mh_lightning.fit(method("DualPrompt"), stream(), run_dir=tmp_path, **QUIET)
    for file, begun in (("task_1.ckpt", 1), ("last.ckpt", 2)):
        loaded = mh_lightning.load(results.folder / "checkpoints" / file).method
        assert loaded.learnt_stream is not None and loaded.learnt_stream.tasks_begun == begun
    half = mh_lightning.load(results.folder / "checkpoints" / "task_1.ckpt").method
    with pytest.raises(UserError, match="DualPrompt: the run was cut short after task 1 of 2"):
        mh_lightning.fit(half, stream(class_names=["a", "b", "c", "d"]), run_dir=tmp_path, **QUIET)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "convit_tiny", "eva02_tiny_patch14_224"])
def test_transformers_of_another_kind(name: str) -> None:
    with pytest.raises(UserError, match=r"prompts the tokens of a vision transformer|VisualPrompts are tokens"):
        L2P(TimmBackbone(name), nn.Linear)
    with pytest.raises(UserError, match="VisualPrompts are tokens"):
        TimmBackbone(name, peft=VisualPrompts())


def test_blocks_of_another_kind() -> None:
    with pytest.raises(UserError, match="an attention of their own kind"):
        DualPrompt(TimmBackbone("vit_small_patch16_18x2_224"), nn.Linear)
    for layers in ((), (0, 0)):
        with pytest.raises(UserError, match="give some of these, each once"):
            CODAPrompt(TimmBackbone("test_vit", image_size=32), nn.Linear, layers=layers)
