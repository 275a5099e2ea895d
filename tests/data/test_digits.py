"""scikit-learn's digits as a stream."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from mh_lightning.data import Digits


def test_split_is_fixed_and_stratified() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    first, second = Digits(split_seed=1).load(), Digits(split_seed=2, class_order_seed=3).load()
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert np.array_equal(first.test.labels, second.test.labels)
    everything = np.bincount(load_digits().target)
    test = np.bincount(first.test.labels)
    assert np.abs(test - everything / 4).max() < 1
    assert (np.bincount(first.train.labels) + test == everything).all()
    assert (len(first.train.labels), len(first.test.labels)) == (1347, 450)
    assert first.class_names == [str(digit) for digit in range(10)]


def test_no_image_is_lost_or_in_both() -> None:
    splits = Digits().load()
    assert splits.train.inputs.dtype == torch.uint8 and splits.train.inputs.max() == 255
    bunch = load_digits()

    def listed(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
        pairs = zip(images.astype(np.uint8), labels, strict=True)
        return sorted(image.tobytes() + bytes([label]) for image, label in pairs)

    given = np.round(bunch.images * 255 / 16)
    read = [part.inputs.numpy() for part in (splits.train, splits.test)]
    labels = [part.labels for part in (splits.train, splits.test)]
    assert listed(np.concatenate(read), np.concatenate(labels)) == listed(given, bunch.target)


def test_stream() -> None:
    digits = Digits(increment=2, class_order_seed=0)
    digits.setup("fit")
    order = np.random.RandomState(0).permutation(10)
    assert digits.class_groups == order.reshape(5, 2).tolist()
    assert (digits.num_classes, digits.num_tasks) == (10, 5)
    for task, group in enumerate(digits.class_groups):
        labels = digits.load().test.labels
        assert digits.num_samples("test", task) == np.isin(labels, group).sum()
    x, targets, tasks = next(iter(digits.train_dataloader()))
    assert x.shape == (32, 3, 8, 8) and set(targets.tolist()) == set(digits.class_groups[0]) and not tasks.any()
