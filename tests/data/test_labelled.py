"""Samples as items."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mh_lightning.data.labelled import Labelled, StreamDataset, check_finite, check_labels
from tests.data.refusal import refused

GREY = torch.tensor([[[0, 255], [51, 102]], [[1, 2], [3, 4]]], dtype=torch.uint8)


def test_items_of_features() -> None:
    features = torch.randn(3, 4)
    dataset = StreamDataset(Labelled(features, np.array([5, 6, 7])), np.array([2, 0, 1]))
    x, label, task = dataset[1]
    assert len(dataset) == 3 and torch.equal(x, features[1])
    assert (label, task) == (6, 0) and type(label) is type(task) is int


def test_items_of_images() -> None:
    grey = StreamDataset(Labelled(GREY, np.array([0, 1])), np.array([0, 0]))[0][0]
    expected = torch.tensor([[0.0, 1.0], [0.2, 0.4]])
    torch.testing.assert_close(grey, expected.expand(3, 2, 2))
    colours = torch.stack([GREY, GREY // 2, GREY // 3], dim=3)
    rgb = StreamDataset(Labelled(colours, np.array([0, 1])), np.array([0, 0]))[0][0]
    torch.testing.assert_close(rgb, colours[0].permute(2, 0, 1) / 255)


def test_transform_gets_an_rgb_image(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(GREY[0].numpy()).save(path)
    seen: list[Image.Image] = []

    def transform(image: Image.Image) -> torch.Tensor:
        seen.append(image)
        return torch.ones(1)

    for inputs in (GREY, [str(path)]):
        dataset = StreamDataset(Labelled(inputs, np.zeros(len(inputs), dtype=np.int64)), np.zeros(2, int), transform)
        assert torch.equal(dataset[0][0], torch.ones(1))
    assert [image.mode for image in seen] == ["RGB", "RGB"]
    assert all(np.array(image)[:, :, 2].tolist() == GREY[0].tolist() for image in seen)


def test_take() -> None:
    indices = np.array([2, 0])
    paths = Labelled(["a", "b", "c"], np.array([0, 1, 2])).take(indices)
    assert paths.inputs == ["c", "a"] and paths.labels.tolist() == [2, 0]
    tensors = Labelled(torch.arange(3.0), np.array([0, 1, 2])).take(indices)
    assert tensors.inputs.tolist() == [2.0, 0.0] and tensors.labels.tolist() == [2, 0]


def test_checks() -> None:
    check_labels(np.array([0, 2]), 3, "train")
    refused(lambda: check_labels(np.array([0, 3]), 3, "test"), "data: test labels", "0 to 2", "got 3")
    refused(lambda: check_labels(np.array([-1, 1]), 3, "train"), "data: train labels", "got -1")
    inputs = torch.zeros(4, 2, 2)
    check_finite(inputs, "train")
    check_finite(["a path"], "train")
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = inputs.clone()
        broken[2, 1, 0] = value
        refused(lambda broken=broken: check_finite(broken, "test"), "data: test inputs", "NaN or infinite", "sample 2")
