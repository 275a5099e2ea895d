"""Samples as items."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mh_lightning.data import GaussianNoise, Unperturbed
from mh_lightning.data.labelled import Labelled, Rows, StreamDataset
from mh_lightning.data.sample_checks import check_domains, check_finite, check_labels
from mh_lightning.data.splits import one_domain_a_perturbation
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


def test_rows() -> None:
    paths = Rows(["a", "b", "c"], np.array([2, 0, 2]))
    assert (len(paths), paths[0], paths[1], list(paths)) == (3, "c", "a", ["c", "a", "c"])
    images = Rows(GREY, np.array([1, 0, 1]))
    assert torch.equal(images[2], GREY[1]) and images[2].data_ptr() == GREY[1].data_ptr()
    taken = Labelled(images, np.array([7, 8, 9]), np.array([0, 1, 2])).take(np.array([1, 2]))
    assert isinstance(taken.inputs, Rows) and taken.inputs.source is GREY and taken.inputs.rows.tolist() == [0, 1]
    assert taken.labels.tolist() == [8, 9] and taken.domains.tolist() == [1, 2]


def test_domain_of_sample() -> None:
    assert Labelled(["a", "b"], np.array([3, 4])).domain_of_sample.tolist() == [0, 0]
    assert Labelled(["a", "b"], np.array([3, 4]), np.array([1, 0])).domain_of_sample.tolist() == [1, 0]


def test_a_batch_is_its_items() -> None:
    labels, tasks = np.array([3, 4, 5, 6]), np.array([0, 1, 0, 1])
    perturbations = [Unperturbed(), GaussianNoise(0.5, 0.5)]
    perturbed = one_domain_a_perturbation(Labelled(GREY, labels[:2]), 2)
    for dataset in (
        StreamDataset(Labelled(torch.randn(4, 2, 3), labels), tasks),
        StreamDataset(Labelled(GREY.repeat(2, 1, 1), labels), tasks),
        StreamDataset(perturbed, tasks, perturbations=perturbations),
    ):
        for indices in ([2, 0, 3], [1], [0, 0]):
            x, targets, of_tasks = dataset.__getitems__(indices)
            items = [dataset[index] for index in indices]
            assert torch.equal(x, torch.stack([item[0] for item in items])) and x.dtype == torch.float32
            assert targets.tolist() == [item[1] for item in items] and targets.dtype == torch.int64
            assert of_tasks.tolist() == [item[2] for item in items] and of_tasks.dtype == torch.int64


def test_checks() -> None:
    check_labels(np.array([0, 2]), 3, "train")
    refused(lambda: check_labels(np.array([0, 3]), 3, "test"), "data: test labels", "0 to 2", "got 3")
    refused(lambda: check_labels(np.array([-1, 1]), 3, "train"), "data: train labels", "got -1")
    check_domains(np.array([0, 1, 1]), 2, "train")
    refused(lambda: check_domains(np.array([0, 2]), 2, "test"), "data: test domains", "0 to 1", "got 2")
    refused(lambda: check_domains(np.array([-1]), 1, "validation"), "data: validation domains", "got -1")
    inputs = torch.zeros(4, 2, 2)
    check_finite(inputs, "train")
    check_finite(["a path"], "train")
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = inputs.clone()
        broken[2, 1, 0] = value
        refused(lambda broken=broken: check_finite(broken, "test"), "data: test inputs", "NaN or infinite", "sample 2")
