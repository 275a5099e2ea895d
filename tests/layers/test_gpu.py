"""Layers on a GPU give what they give on a CPU."""

import copy
from collections.abc import Callable

import pytest
import torch

from mh_lightning import MHLinear
from mh_lightning.heads import (
    ClassMeans,
    ClosedFormHead,
    KernelMemoryUnits,
    RandomFeatureRidge,
    RandomProjectionRidge,
    RegularisedDiscriminant,
    RidgeRegression,
    ShrunkClassCovariances,
    StreamingLinearDiscriminant,
    TruncatedProjection,
)
from tests.blobs import CLASSES, FEATURES, blobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS: dict[str, Callable[[], ClosedFormHead]] = {
    "means": lambda: ClassMeans(FEATURES, CLASSES),
    "discriminant": lambda: StreamingLinearDiscriminant(FEATURES, CLASSES),
    "covariances": lambda: ShrunkClassCovariances(FEATURES, CLASSES),
    "ridge": lambda: RandomProjectionRidge(FEATURES, CLASSES, num_projections=20),
    "kernel memory": lambda: KernelMemoryUnits(FEATURES, CLASSES, key_mem_units=20, max_bytes=2000, seed=0),
    "random features": lambda: RandomFeatureRidge(FEATURES, CLASSES, num_projections=20, seed=0),
    "regularised discriminant": lambda: RegularisedDiscriminant(FEATURES, CLASSES),
    "truncated projection": lambda: TruncatedProjection(FEATURES, CLASSES, num_projections=20, rank=9, seed=0),
    "one ridge": lambda: RidgeRegression(FEATURES, CLASSES),
}


@pytest.mark.parametrize("distance", ["cosine", "dot_scaled", "euclidean"])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_a_memory_head(distance: str, shared_keys: bool) -> None:
    torch.manual_seed(0)
    on_cpu = MHLinear.published(6, 4, key_mem_units=8, delta=2, distance=distance, shared_keys=shared_keys,
            gamma_alpha=5.0,
                      upd_m="WTA", upd_k="ad_hoc_WTA", beta_k=0.05, scramble=True, tau_alpha=0.95, tau_mu=8, tau_eta=6,
                      dtype=torch.float64)  # fmt: skip
    on_gpu = copy.deepcopy(on_cpu).cuda()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (on_cpu, on_gpu)]
    for _ in range(30):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
        for layer, optimizer, device in zip((on_cpu, on_gpu), optimizers, ("cpu", "cuda"), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x.to(device)), y.to(device)).backward()
            optimizer.step()
    assert on_cpu.scrambling_count.sum() > 0
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_counters_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = MHLinear.published(6, 4, key_mem_units=8, delta=2, distance="euclidean", gamma_alpha=5.0, upd_m="WTA",
                     upd_k="ad_hoc_WTA", beta_k=0.05, scramble=True, tau_alpha=0.95, tau_mu=8, tau_eta=6,
                     device="cuda")  # fmt: skip
    mixed = copy.deepcopy(plain)
    for _ in range(20):
        x = torch.randn(8, 6, device="cuda")
        plain(x).sum().backward()
        with torch.autocast("cuda", dtype):
            y = mixed(x)
        assert y.dtype == dtype
        y.float().sum().backward()
    assert plain.scrambling_count.sum() > 0
    for name in ("K", "mu", "eta", "key_counter", "scrambling_count"):
        torch.testing.assert_close(getattr(mixed, name), getattr(plain, name), rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_closed_form_head(name: str) -> None:
    torch.manual_seed(0)
    on_cpu, on_gpu = HEADS[name](), HEADS[name]().cuda()
    x, targets = blobs(1500, 1)
    for rows, classes in zip(x.split(40), targets.split(40), strict=True):
        on_cpu.update(rows, classes)
        on_gpu.update(rows.cuda(), classes.cuda())
    queries = blobs(50, 2)[0]
    logits = on_gpu(queries.cuda())
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), on_cpu(queries), rtol=1e-3, atol=1e-3)
    torch.manual_seed(1)
    again = HEADS[name]().cuda()
    again.load_state_dict(on_cpu.state_dict())
    torch.testing.assert_close(again(queries.cuda()).cpu(), on_cpu(queries), rtol=1e-3, atol=1e-3)
    states = on_cpu.state_dict(), on_gpu.cpu().state_dict()
    for entry, value in states[0].items():
        torch.testing.assert_close(states[1][entry], value, rtol=1e-4, atol=1e-3)
