"""The layer on a GPU gives what it gives on a CPU."""

import copy

import pytest
import torch

from mh_lightning import MHLinear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("distance", ["cosine", "dot_scaled", "euclidean"])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_gpu_equals_cpu(distance: str, shared_keys: bool) -> None:
    torch.manual_seed(0)
    on_cpu = MHLinear(6, 4, key_mem_units=8, delta=2, distance=distance, shared_keys=shared_keys, gamma_alpha=5.0,
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
