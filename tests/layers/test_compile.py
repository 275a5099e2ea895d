"""`torch.compile`, `torch.export` and ONNX: whole graphs in evaluation, one break in training, equal results."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mh_lightning import MHLinear
from mh_lightning.functional import grouped

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
        nn.Linear(6, 8),
        nn.Tanh(),
        MHLinear.published(8, 3, key_mem_units=7, delta=2, gamma_alpha=5.0, tau_eta=3, **options),
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


def large_layer() -> MHLinear:
    """One whose products are computed unit by unit when nothing is recorded."""
    layer = MHLinear.published(256, 100, key_mem_units=50, delta=2, gamma_alpha=5.0).eval()
    assert grouped.grouping_pays(8, 16, 50, 100 * 256, "cpu")
    return layer


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("record", [make_fx, lambda layer: lambda x: torch.jit.trace(layer, x)], ids=["fx", "jit"])
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_recorded_graphs_do_not_depend_on_the_recorded_batch(
    record: Callable[[MHLinear], Callable[[Tensor], Callable[[Tensor], Tensor]]], grad: bool
) -> None:
    layer, x, other = large_layer(), torch.randn(8, 256), torch.randn(8, 256)
    with torch.set_grad_enabled(grad):
        recorded = record(layer)(x)
        torch.testing.assert_close(recorded(other), layer(other))


def test_shapes_without_data() -> None:
    with FakeTensorMode():
        assert large_layer()(torch.randn(8, 256)).shape == (8, 100)
    assert large_layer().to("meta")(torch.randn(8, 256, device="meta")).shape == (8, 100)


def test_images_can_be_exported() -> None:
    layer = MHLinear.published(48, 3, key_mem_units=4, delta=2, psi_fn="resize2d", key_size=20).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
