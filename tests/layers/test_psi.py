"""Maps to key space, against numbers worked by hand."""

import pytest
import torch

from mh_lightning import MHLinear
from mh_lightning.errors import UserError
from mh_lightning.layers.psi import psi, resized_shape

IMAGE = torch.tensor([[[[1.0, 2.0, 3.0, -4.0], [5.0, 6.0, -7.0, -8.0]]]])


def test_identity_and_sign() -> None:
    x = torch.tensor([[1.5, -2.0, 0.0]])
    assert torch.equal(psi(x, "identity", 3), x)
    assert torch.equal(psi(x, "sign", 3), torch.tensor([[1.0, -1.0, 0.0]]))


def test_resize1d() -> None:
    x = torch.tensor([[0.0, 4.0, 8.0]])
    assert torch.equal(psi(x, "resize1d", 3), x)
    # output i looks at (i + 0.5) * 3 / 6 - 0.5 = -0.25, 0.25, 0.75, 1.25, 1.75, 2.25, held at the borders
    torch.testing.assert_close(psi(x, "resize1d", 6), torch.tensor([[0.0, 1.0, 3.0, 5.0, 7.0, 8.0]]))


@pytest.mark.parametrize(
    ("channels", "height", "width", "key_size", "expected"),
    [
        (1, 2, 4, 3, (1, 2)),
        (3, 32, 32, 200, (8, 8)),  # 66 numbers a channel, side 8.12
        (1, 3, 3, 8, (2, 3)),  # side 2.83, rounded up
        (1, 10, 40, 100, (5, 20)),
        (1, 40, 10, 100, (20, 5)),
        (3, 7, 7, 147, (7, 7)),
    ],
)
def test_resized_shape(channels: int, height: int, width: int, key_size: int, expected: tuple[int, int]) -> None:
    assert resized_shape(channels, height, width, key_size) == expected


def test_resize2d() -> None:
    # 3 numbers: width round(sqrt(3 / 8) * 4) = 2, height 3 // 2 = 1, hence means of 2 x 2 blocks and one zero
    assert torch.equal(psi(IMAGE, "resize2d", 3), torch.tensor([[3.5, -4.0, 0.0]]))
    assert torch.equal(psi(IMAGE, "resize2d_sign", 3), torch.tensor([[1.0, -1.0, 0.0]]))
    two_channels = torch.cat([IMAGE, 2 * IMAGE], dim=1)
    assert torch.equal(psi(two_channels, "resize2d", 5), torch.tensor([[3.5, -4.0, 7.0, -8.0, 0.0]]))


@pytest.mark.parametrize(("psi_fn", "key"), [("resize2d", [3.5, -4.0, 0.0]), ("resize2d_sign", [1.0, -1.0, 0.0])])
def test_layer_on_images(psi_fn: str, key: list[float]) -> None:
    layer = MHLinear.published(8, 2, key_mem_units=4, delta=2, psi_fn=psi_fn, key_size=3,
            distance="dot_scaled", scramble=True,
                     tau_alpha=1e9, upd_m="WTA", upd_k="ad_hoc_WTA", beta_k=0.0)  # fmt: skip
    y = layer(IMAGE)
    y.sum().backward()
    recycled = (layer.K[0] == torch.tensor(key)).all(1)
    assert y.shape == (1, 2) and recycled.sum() == 1
    # nothing but this key answers, so one more forward is that unit's plain linear map of the pixels
    layer.eval().gamma_alpha = 1e6
    rows = layer.M[0, recycled].reshape(2, 9)
    torch.testing.assert_close(layer(IMAGE)[0], rows[:, :8] @ IMAGE.flatten() + rows[:, 8])


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (1, 1, 3, 3), (1, 2, 4)])
def test_resize2d_needs_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="psi_fn='resize2d'"):
        MHLinear.published(8, 2, delta=2, psi_fn="resize2d", key_size=3)(torch.randn(shape))


def test_resize2d_needs_room() -> None:
    with pytest.raises(UserError, match="key_size=2"):
        MHLinear.published(12, 2, delta=2, psi_fn="resize2d", key_size=2)(torch.randn(1, 3, 2, 2))
