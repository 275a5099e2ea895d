"""`torch.compile`, `torch.export` and ONNX: whole graphs in evaluation, one break in training, equal results."""

import io
from collections.abc import Iterator
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mh_lightning import MHLinear

CASES: dict[str, dict[str, Any]] = {
    "wta": {"upd_m": "WTA", "upd_k": "ad_hoc_WTA", "scramble": True},
    "vanilla": {"distance": "dot_scaled", "detach_gradients": False, "psi_fn": "resize1d", "key_size": 5},
    "layer_norm": {"distance": "euclidean", "layer_norm": True},
    "private": {"shared_keys": False, "upd_m": "WTA", "upd_k": "grad_WTA", "bias": False},
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(options: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), MHLinear(8, 3, key_mem_units=7, delta=2, gamma_alpha=5.0, tau_eta=3, **options)
    )


def gradients(net: nn.Module, outputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs.square().sum(), [p for p in net.parameters() if p.requires_grad]))


@every_case
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_is_one_graph(options: dict[str, Any], grad: bool) -> None:
    net, x = build(options).eval(), torch.randn(5, 6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), net(x))
        if grad:
            torch.testing.assert_close(gradients(net, compiled(x)), gradients(net, net(x)))


@every_case
def test_training_has_one_break(options: dict[str, Any]) -> None:
    """Handing over to the end of the backward pass, which is Python, is the break."""
    assert torch._dynamo.explain(build(options))(torch.randn(5, 6)).graph_break_count == 1


@every_case
def test_training_compiled_equals_training(options: dict[str, Any]) -> None:
    net, compiled_net = build(options), build(options)
    compiled = torch.compile(compiled_net, backend="aot_eager")
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (net, compiled_net)]
    for _ in range(6):
        x = torch.randn(5, 6)
        for model, optimizer in zip((net, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert net[2].key_counter.sum() == 30 * len(net[2].K)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(compiled_net.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@every_case
def test_exported_program(options: dict[str, Any]) -> None:
    net = build(options).eval()
    program = torch.export.export(net, (torch.randn(5, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for batch in (2, 9):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(torch.export.load(file).module()(x), net(x))
        file.seek(0)


@every_case
def test_onnx(options: dict[str, Any]) -> None:
    net = build(options).eval()
    program = torch.onnx.export(
        net, (torch.randn(5, 6),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for batch in (2, 9):
        x = torch.randn(batch, 6)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs), net(x).detach())


def test_images_can_be_exported() -> None:
    layer = MHLinear(48, 3, key_mem_units=4, delta=2, psi_fn="resize2d", key_size=20).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
