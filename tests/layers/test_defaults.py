"""The layer as it comes, in the loop that anybody writes."""

import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import MHLinear

RECIPE = {"key_mem_units": 500, "delta": 5, "distance": "euclidean", "sigma_eu": "auto", "gamma_alpha": "auto",
          "upd_m": "WTA", "upd_k": "ad_hoc_WTA", "beta_k": 0.003, "scramble": True, "tau_alpha": 0.65, "tau_mu": 10,
          "tau_eta": 100}  # fmt: skip


def split_digits(layer: nn.Module, seed: int) -> float:
    """Mean accuracy on five tasks of two digits, learnt one after the other."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = F.normalize(x.float(), dim=1)
    train, test = (torch.tensor(part) for part in train_test_split(range(len(y)), random_state=seed, stratify=y))
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    for task in range(5):
        rows = train[y[train] // 2 == task]
        for batch in rows[torch.randperm(len(rows))].split(8):
            loss = F.cross_entropy(layer(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = layer.eval()(x[test]).argmax(dim=1) == y[test]
    return float(torch.stack([right[y[test] // 2 == task].float().mean() for task in range(5)]).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_a_stream_as_it_comes(seed: int) -> None:
    found = {}
    for name, options in (("default", {}), ("recipe", RECIPE)):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer = MHLinear(64, 10, **options)  # type: ignore[arg-type]
            found[name] = split_digits(layer, seed)
    torch.manual_seed(seed)
    found["published"] = split_digits(MHLinear.published(64, 10), seed)
    torch.manual_seed(seed)
    found["linear"] = split_digits(nn.Linear(64, 10), seed)
    assert found["default"] > found["recipe"] - 0.05
    assert found["default"] > 0.5 and max(found["linear"], found["published"]) < 0.35


def test_the_published_defaults_are_one_call_away() -> None:
    layer = MHLinear.published(8, 3)
    assert (layer.key_mem_units, layer.delta, layer.distance, layer.upd_m, layer.upd_k, layer.scramble) == (
        2, 2, "cosine", "vanilla", "grad_not_WTA", False)  # fmt: skip
    assert (layer.gamma_alpha, layer.beta_k, layer.tau_alpha, layer.tau_mu, layer.tau_eta) == (
        0.1,
        0.001,
        0.5,
        100,
        100,
    )
    wide = MHLinear.published(8, 3, False, key_mem_units=9, distance="euclidean")
    assert (wide.delta, wide.sigma_eu, wide.bias, wide.distance) == (3, 1.0, False, "euclidean")
    with pytest.warns(UserWarning, match="delta=5"):
        MHLinear.published(8, 3, delta=5)
    small: Tensor = MHLinear(8, 3, key_mem_units=2)(torch.ones(1, 8))  # no warning: nobody asked for five
    assert small.shape == (1, 3)
