"""The command line on a GPU gives what it gives on a CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mh_lightning.backbones import TimmBackbone
from mh_lightning.data.features import FeatureCache
from mh_lightning.data.features.fingerprint import image_digests
from mh_lightning.data.labelled import Labelled, StreamDataset
from tests.conftest import results_of, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Run = Callable[..., Path]
ROOT = Path(__file__).parents[1]
ON_GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", "1")


def test_a_memory_head(run: Run, tiny_config: Path) -> None:
    on_cpu, on_gpu = run("fit", tiny_config), run("fit", tiny_config, *ON_GPU)
    assert results_of(on_gpu)["average_accuracy"] == pytest.approx(results_of(on_cpu)["average_accuracy"], abs=0.1)
    assert weights_of(on_gpu)["head.key_counter"].sum() == weights_of(on_cpu)["head.key_counter"].sum()


def test_it_resumes(run: Run, tiny_config: Path) -> None:
    whole = run("fit", tiny_config, *ON_GPU)
    resumed = run("fit", tiny_config, *ON_GPU, "--ckpt_path", str(whole / "checkpoints" / "task_2.ckpt"))
    assert results_of(resumed) == results_of(whole)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(run: Run, tiny_config: Path, precision: str) -> None:
    folder = run("fit", tiny_config, *ON_GPU, "--trainer.precision", precision)
    assert results_of(folder)["average_accuracy"] > 0.3
    assert weights_of(folder)["head.K"].dtype == torch.float32


def test_features_of_images(tmp_path: Path) -> None:
    backbone = TimmBackbone("test_vit.r160_in1k", pretrained=False)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 20, 20, 3), dtype=np.uint8)
    samples = Labelled(torch.from_numpy(pixels), np.zeros(len(pixels), dtype=np.int64))
    transform = backbone.transform(False)
    dataset = StreamDataset(samples, samples.labels, transform)
    found = [
        FeatureCache(str(tmp_path / device)).features(
            image_digests(samples), dataset.input, backbone.to(device), transform, augment=False,
            device=torch.device(device),
        ).gather(np.arange(len(pixels)))
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05)


def test_closed_form_heads_on_kept_features(run: Run, tmp_path: Path) -> None:
    few = ("--data.init_args.max_train_samples", "400", "--data.init_args.max_test_samples", "200",
             "--data.init_args.feature_cache.folder", str(tmp_path / "features"))  # fmt: skip
    for method in ("kernel_memory_head", "slda", "fecam"):
        config = ROOT / "configs" / "streams" / "digits.yaml"
        small = ("--config", f"methods/{method}.yaml", *few)
        on_cpu = run("fit", config, *small, "--trainer.accelerator", "cpu")
        on_gpu = run("fit", config, *small, *ON_GPU)
        assert results_of(on_gpu)["average_accuracy"] == pytest.approx(results_of(on_cpu)["average_accuracy"], abs=0.02)
