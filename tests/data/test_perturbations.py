"""Perturbed images: what each perturbation does, and that each image is always perturbed alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mh_lightning.data import GaussianNoise, Occlusion, Perturbation, Tensors, Unperturbed
from tests.conftest import results_of, weights_of
from tests.data.refusal import refused, refused_stream
from tests.data.test_stream import attach


def image(value: int, height: int = 60, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def perturbed(perturbation: Perturbation, pixels: np.ndarray, seed: int = 0) -> np.ndarray:
    before = pixels.copy()
    result = perturbation(pixels, np.random.default_rng(seed))
    assert np.array_equal(pixels, before) and result.dtype == np.uint8 and result.shape == pixels.shape
    return result


def test_unperturbed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(perturbed(Unperturbed(), pixels), pixels)


@pytest.mark.parametrize(("factor", "sigma"), [(0.25, 0.1), (0.5, 0.2), (1.0, 0.02), (0.0, 1.0)])
def test_noise_has_the_spread_factor_times_sigma(factor: float, sigma: float) -> None:
    noise = perturbed(GaussianNoise(factor, sigma), image(128)).astype(float) - 128
    spread = 255 * factor * sigma
    assert abs(noise.mean()) <= 0.05 * spread
    # rounding to whole levels adds a variance of 1 / 12
    assert noise.std() == pytest.approx((spread**2 + (1 / 12 if spread else 0)) ** 0.5, rel=0.03)
    if spread:  # each number of the image has noise of its own
        colours = noise.reshape(-1, 3).T
        assert np.abs(np.corrcoef(colours) - np.eye(3)).max() < 0.06
        assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.06
        below = (noise <= -spread).mean()
        assert below == pytest.approx(0.159, abs=0.03 if spread > 5 else 0.05)


@pytest.mark.parametrize("value", [0, 255])
def test_noise_is_clipped(value: int) -> None:
    noisy = perturbed(GaussianNoise(1.0, 0.5), image(value)).astype(int)
    assert 0.47 < (noisy == value).mean() < 0.53  # the half that would leave the range
    assert 0.018 < (noisy == 255 - value).mean() < 0.028  # 2.3 % are two standard deviations away or more


@pytest.mark.parametrize(("fraction", "height", "width"), [(0.25, 30, 40), (0.01, 6, 8), (0.5, 42, 57), (1, 60, 80)])
def test_occlusion_is_a_rectangle_of_the_given_area(fraction: float, height: int, width: int) -> None:
    assert height * width == pytest.approx(fraction * 60 * 80, rel=0.01)
    corners = set()
    for seed in range(300):
        white = (perturbed(Occlusion(fraction), image(7), seed) == 255).all(axis=2)
        rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
        assert (len(rows), len(columns)) == (height, width) == (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert white.sum() == height * width
        corners.add((rows[0], columns[0]))
    tops, lefts = (np.array(sorted(corners)).T[axis] for axis in (0, 1))
    assert tops.min() <= 0.1 * 60 and lefts.min() <= 0.1 * 80
    assert tops.max() >= 0.9 * (60 - height) and lefts.max() >= 0.9 * (80 - width)
    assert len(corners) > 100 or fraction == 1


def test_occlusion_leaves_the_rest() -> None:
    result = perturbed(Occlusion(0.25), image(7))
    assert set(np.unique(result)) == {7, 255}
    assert np.array_equal(perturbed(Occlusion(0), image(7)), image(7))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GaussianNoise(-0.1, 0.1), ("data.perturbations", "factor", "-0.1")),
        (lambda: GaussianNoise(0.1, float("nan")), ("data.perturbations", "sigma", "nan")),
        (lambda: GaussianNoise(float("inf"), 1), ("data.perturbations", "factor", "inf")),
        (lambda: Occlusion(1.01), ("data.perturbations", "fraction", "1.01")),
        (lambda: Occlusion(-0.5), ("data.perturbations", "fraction", "-0.5")),
        (lambda: Occlusion(float("nan")), ("data.perturbations", "fraction", "nan")),
    ],
)
def test_refused_arguments(make, parts: tuple[str, ...]) -> None:
    refused(make, *parts)


NOISES = [Unperturbed(), GaussianNoise(0.5, 0.2), GaussianNoise(0.5, 0.2), Occlusion(0.3)]


def grey_stream(**options: object) -> Tensors:
    """Twelve equal images of two classes, and six of them as test samples."""
    images, labels = torch.full((12, 16, 16), 128, dtype=torch.uint8), torch.arange(12) % 2
    stream = Tensors(images, labels, images[:6], labels[:6], **{"perturbations": NOISES, "scenario": "CDI"} | options)
    stream.setup("fit")
    return stream


def images_of(loader) -> list[bytes]:
    return [x.numpy().tobytes() for batch, _, _ in loader for x in batch]


def test_each_perturbation_is_a_domain() -> None:
    stream = grey_stream()
    assert [tuple(task) for task in stream.tasks] == [([label], domain) for domain in range(4) for label in (0, 1)]
    assert stream.name_of_task(3) == "class 1 in domain 2"
    for task in range(8):
        x, targets, tasks = next(iter(attach(stream, epoch=task).train_dataloader()))
        assert targets.tolist() == [task % 2] * 6 and tasks.tolist() == [task] * 6
        levels = (x * 255).round()
        noisy = {0: False, 1: True, 2: True, 3: False}[task // 2]
        assert (len(levels.unique()) > 20) == noisy
        assert ((levels == 255).float().mean() > 0.2) == (task // 2 == 3)
    assert torch.equal(next(iter(attach(stream).train_dataloader()))[0] * 255, torch.full((6, 3, 16, 16), 128.0))


def test_images_are_perturbed_differently_in_each_domain_and_split() -> None:
    stream = grey_stream(split_fractions=[0.5, 0.2, 0.3])
    noisy: list[bytes] = []
    for split in ("train", "validation", "test"):
        rows = np.flatnonzero(np.isin(stream._splits[split].domains, [1, 2]))
        tasks = np.zeros(len(stream._splits[split].labels), dtype=np.int64)
        dataset = stream._dataset(split, rows, tasks[rows])
        noisy += [dataset[index][0].numpy().tobytes() for index in range(len(rows))]
    assert len(noisy) == len(set(noisy)) == 2 * 18


def test_an_image_is_always_perturbed_alike() -> None:
    alone = grey_stream(epochs_per_task=2)
    train = [sorted(images_of(attach(alone, epoch).train_dataloader())) for epoch in range(16)]
    test = images_of(attach(alone).test_dataloader()[0])
    assert train[::2] == train[1::2] and len({tuple(images) for images in train}) == 7  # both classes are grey at first
    again = grey_stream(epochs_per_task=2, num_workers=2, batch_size=2)
    assert [sorted(images_of(attach(again, epoch).train_dataloader())) for epoch in (6, 15)] == [train[6], train[15]]
    assert images_of(attach(again).test_dataloader()[0]) == test
    other = grey_stream(epochs_per_task=2, split_seed=1)
    assert sorted(images_of(attach(other, 6).train_dataloader())) != train[6]


def test_classes_of_all_domains() -> None:
    stream = grey_stream(scenario="CI")
    assert [stream.num_samples("train", task) for task in range(stream.num_tasks)] == [24, 24]
    stream = grey_stream(scenario="DI", increment=2)
    assert [stream.num_samples("test", task) for task in range(stream.num_tasks)] == [6] * 4


def test_only_images_without_domains() -> None:
    images, labels = torch.zeros(4, 2, 2, dtype=torch.uint8), torch.arange(4) % 2
    features = torch.zeros(4, 2)
    refused_stream(Tensors(features, labels, features, labels, perturbations=NOISES), "data.perturbations", "features")
    domains = {"domain_train": labels, "domain_test": labels}
    refused_stream(
        Tensors(images, labels, images, labels, **domains, perturbations=NOISES), "data.perturbations", "own"
    )


def test_checkpoint_of_other_perturbations() -> None:
    saved = grey_stream().state_dict()
    assert saved["perturbations"][1:] == ["GaussianNoise(factor=0.5, sigma=0.2)"] * 2 + ["Occlusion(fraction=0.3)"]
    grey_stream(perturbations=[Unperturbed(), *[GaussianNoise(0.5, 0.2)] * 2, Occlusion(0.3)]).load_state_dict(saved)
    for changed in (GaussianNoise(0.5, 0.1), Occlusion(0.5), Unperturbed()):
        other = grey_stream(perturbations=[*NOISES[:3], changed])
        refused(
            lambda other=other: other.load_state_dict(saved), "ckpt_path", "perturbations", "Occlusion(fraction=0.3)"
        )


CONFIG = """
model:
  class_path: FineTuning
  init_args:
    backbone: {class_path: TimmBackbone, init_args: {name: test_resnet, image_size: 16}}
    head: {class_path: torch.nn.Linear}
data:
  class_path: Digits
  init_args: {scenario: CDI, increment: 10, batch_size: 8, max_train_samples: 40, max_test_samples: 20}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "perturbed.yaml"
    path.write_text(CONFIG)
    return path


def option(*perturbations: str) -> tuple[str, str]:
    return "--data.init_args.perturbations", f"[{', '.join(perturbations)}]"


def test_command_line(run: Callable[..., Path], config: Path, refuses: Callable[..., str]) -> None:
    noise = "GaussianNoise, init_args: {factor: 0.5, sigma: 0.5}}"
    short = run("fit", config, *option("Unperturbed", f"{{class_path: {noise}"))
    assert results_of(short)["num_tasks"] == 2
    saved = short / "config.yaml"
    assert saved.read_text().count("class_path: mh_lightning.data.") == 3  # the data set and two perturbations
    again = run("fit", saved)
    assert results_of(again) == results_of(short)
    assert all(torch.equal(tensor, weights_of(short)[name]) for name, tensor in weights_of(again).items())
    checkpoint = ("--ckpt_path", str(short / "checkpoints" / "last.ckpt"))
    message = refuses("fit", config, *checkpoint, *option("Unperturbed", "Unperturbed"))
    assert "data.init_args.perturbations" in message and "cannot change in a run" in message


@pytest.mark.parametrize(
    ("perturbation", "parts"),
    [
        ("Blur", ("'Blur' is no class",)),
        ("mh_lightning.data.Blur", ("'Blur'",)),
        ("torch.nn.Linear", ("torch.nn.Linear", "subclass of Perturbation")),
        ("GaussianNoise", ("factor", "required")),
        ("{class_path: GaussianNoise, init_args: {factor: 0.5, sgma: 0.5}}", ("'sgma' is not accepted",)),
        ("{class_path: GaussianNoise, init_args: {factor: much, sigma: 0.5}}", ("factor", "much")),
        ("{class_path: Occlusion, init_args: {fraction: 2}}", ("fraction must lie in [0, 1], got 2",)),
    ],
)
def test_refused_on_the_command_line(
    refuses: Callable[..., str], config: Path, perturbation: str, parts: tuple[str, ...]
) -> None:
    message = refuses("fit", config, *option("Unperturbed", perturbation))
    assert "data.perturbations" in message and all(part in message for part in parts)
