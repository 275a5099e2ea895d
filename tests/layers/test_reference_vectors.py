"""`MHLinear` against numbers recorded from the published implementation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning import MHLinear
from tests.oracle import Oracle
from tests.products import every_product, products

FILES = sorted((Path(__file__).parents[1] / "reference_vectors").glob("*.npz"))
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


class Case(NamedTuple):
    """One recorded run."""

    options: dict[str, Any]
    optimizer: str
    lr: float
    arrays: dict[str, Tensor]

    def optimizer_of(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer](parameters, lr=self.lr)

    def published_state(self) -> dict[str, Tensor]:
        """The state dict that the published code would have saved at the end."""
        state = {"K": self.arrays["final_K"], "M": self.arrays["final_M"]}
        if self.options["scramble"]:
            state |= {"mu": self.arrays["final_mu"], "eta": self.arrays["final_eta"]}
            state |= {name: self.arrays[name] for name in ("key_counter", "scrambling_count")}
        return state


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    with np.load(request.param) as file:
        config = json.loads(str(file["config"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
    optimizer, lr = config.pop("optimizer"), config.pop("lr")
    for name in ("name", "batch_size", "steps"):
        config.pop(name, None)
    return Case(config, optimizer, lr, arrays)


def test_all_cases_are_here() -> None:
    assert len(FILES) == 26


@every_product
def test_training_and_evaluation(case: Case, by_unit: bool) -> None:
    with products(by_unit):
        compare_with_recording(case)


def compare_with_recording(case: Case) -> None:
    arrays, layer = case.arrays, MHLinear.published(**case.options)
    with torch.no_grad():
        layer.K.copy_(arrays["init_K"])
        layer.M.copy_(arrays["init_M"])
    optimizer = case.optimizer_of(layer.parameters())
    for step, (x, targets) in enumerate(zip(arrays["x"], arrays["y"], strict=True)):
        x.requires_grad_(step == 0)
        outputs = layer(x)
        loss = F.cross_entropy(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.testing.assert_close(outputs, arrays["outputs"][step], **TOLERANCE)
        torch.testing.assert_close(loss.detach(), arrays["losses"][step], **TOLERANCE)
        if step == 0:
            torch.testing.assert_close(layer.M.grad, arrays["step0_grad_M"], **TOLERANCE)
            torch.testing.assert_close(x.grad, arrays["step0_grad_x"], **TOLERANCE)
            assert ("step0_grad_K" in arrays) == isinstance(layer.K, torch.nn.Parameter)
            if "step0_grad_K" in arrays:
                torch.testing.assert_close(layer.K.grad, arrays["step0_grad_K"], **TOLERANCE)
        optimizer.step()
        torch.testing.assert_close(layer.K.detach(), arrays["keys_after_step"][step], **TOLERANCE)
    torch.testing.assert_close(layer.K.detach(), arrays["final_K"], **TOLERANCE)
    torch.testing.assert_close(layer.M.detach(), arrays["final_M"], **TOLERANCE)
    layer.eval()
    torch.testing.assert_close(layer(arrays["eval_x"]), arrays["eval_out"], **TOLERANCE)
    if case.options["scramble"]:
        assert torch.equal(layer.mu, arrays["final_mu"].long())
        assert torch.equal(layer.eta, arrays["final_eta"].long())
        assert torch.equal(layer.scrambling_count, arrays["scrambling_count"])
        # the published code went on counting in evaluation
        assert torch.equal(layer.key_counter + winners_in_evaluation(case), arrays["key_counter"].long())


def winners_in_evaluation(case: Case) -> Tensor:
    oracle = Oracle(case.arrays["final_K"], case.arrays["final_M"], **case.options)
    counts = torch.zeros(case.arrays["final_K"].shape[:2], dtype=torch.long)
    for winners in oracle.forward(case.arrays["eval_x"])[1].winners:
        for key_set, winner in enumerate(winners):
            counts[key_set, winner] += 1
    return counts


def test_published_state_dict(case: Case) -> None:
    published, layer = case.published_state(), MHLinear.published(**case.options)
    layer.load_state_dict(published)
    assert all(getattr(layer, name).dtype == torch.long for name in ("mu", "eta", "key_counter", "scrambling_count"))
    torch.testing.assert_close(layer.eval()(case.arrays["eval_x"]), case.arrays["eval_out"], **TOLERANCE)
    given_back = layer.reference_state_dict()
    assert given_back.keys() == published.keys()
    for name, expected in published.items():
        assert given_back[name].dtype == expected.dtype
        assert torch.equal(given_back[name], expected)


def test_oracle_agrees(case: Case) -> None:
    """What the other tests take for truth is held to the same numbers."""
    arrays = case.arrays
    oracle = Oracle(arrays["init_K"].double(), arrays["init_M"].double(), **case.options)
    optimizer = case.optimizer_of(oracle.parameters())
    steps = zip(arrays["x"].double(), arrays["y"], arrays["outputs"], arrays["keys_after_step"], strict=True)
    for step, (x, targets, expected, keys) in enumerate(steps):
        outputs, seen = oracle.forward(x)
        if oracle.margin < 1e-9:
            # signs make keys that tie exactly, and then rounding decides who wins
            assert case.options.get("psi_fn") == "sign" and step > 3
            return
        torch.testing.assert_close(outputs.float(), expected, **TOLERANCE)
        F.cross_entropy(outputs, targets).backward()
        oracle.update(seen)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(oracle.K.detach().float(), keys, **TOLERANCE)
    torch.testing.assert_close(oracle.M.detach().float(), arrays["final_M"], **TOLERANCE)
    if case.options["scramble"]:
        for name, recorded in (("mu", "final_mu"), ("eta", "final_eta"), ("scrambling_count", "scrambling_count")):
            assert torch.equal(oracle.counters()[name], arrays[recorded].long())


def test_incomplete_state_dict_is_refused() -> None:
    layer = MHLinear.published(3, 2, delta=2, scramble=True)
    with pytest.raises(RuntimeError, match="mu"):
        layer.load_state_dict({"K": layer.K, "M": layer.M})
