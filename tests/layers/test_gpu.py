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


def step_of(layer: MHLinear, x: torch.Tensor, y: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = torch.nn.functional.cross_entropy(layer(x), y)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("options", [{}, {"distance": "cosine", "gamma_alpha": 5.0}], ids=["as it comes", "cosine"])
def test_a_training_step_waits_for_nothing(options: dict[str, object]) -> None:
    layer = MHLinear(64, 10, **options).cuda()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")
    step_of(layer, x, y, optimizer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step_of(layer, x, y, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_is_the_step() -> None:
    """A graph of kernels, launched at once, on batches that are written into the same tensors."""
    torch.manual_seed(0)
    eager = MHLinear(64, 10, key_mem_units=20, tau_eta=10).cuda()
    captured = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (eager, captured)]
    batches = [(torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")) for _ in range(20)]
    x, y = batches[0][0].clone(), batches[0][1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:3]:  # the warm-up takes steps, too
            x.copy_(batch[0])
            y.copy_(batch[1])
            step_of(captured, x, y, optimizers[1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    before = copy.deepcopy(captured.state_dict())
    with torch.cuda.graph(graph):
        step_of(captured, x, y, optimizers[1])
    captured.load_state_dict(before)
    for place, batch in enumerate(batches):
        step_of(eager, *batch, optimizers[0])
        if place >= 3:
            x.copy_(batch[0])
            y.copy_(batch[1])
            graph.replay()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value, rtol=1e-4, atol=1e-5)
