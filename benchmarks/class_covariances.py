"""What it costs to keep class covariances in less memory: their error, and the accuracy after alignment.

    python -m benchmarks.class_covariances --root /usr/share/datasets/fashion-mnist --features data/features

Each kind runs streams/fashion_mnist.yaml with methods/linear_per_task_aligned.yaml, three epochs a task, through the
command line. The error of a class's covariance is the Frobenius norm of its difference from the full one, over the norm
of the full one; the jitter on the diagonal is in both. The memory is that of means, covariances and counts.
"""

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.report import parser, report
from mh_lightning.cli import main as command_line
from mh_lightning.heads import ClassGaussians

CONFIGS = ("--config", "streams/fashion_mnist.yaml", "--config", "methods/linear_per_task_aligned.yaml",
           "--data.epochs_per_task", "3")  # fmt: skip
KINDS = {
    "full": {"covariance": "full"},
    **{f"low_rank {rank}": {"covariance": "low_rank", "rank": rank} for rank in (256, 64, 32, 8)},
    "shared": {"covariance": "shared"},
}


def learn(kind: str, seed: int, folder: Path, arguments: list[str]) -> tuple[ClassGaussians, float]:
    """What a run keeps, and its last accuracy."""
    options = [f"--model.init_args.alignment.{name}={value}" for name, value in KINDS[kind].items()]
    command_line(["fit", *CONFIGS, "--run_dir", str(folder), "--experiment", f"{kind}_{seed}",
                  "--seed_everything", str(seed), "--pictures", "false", "--trainer.enable_progress_bar", "false",
                  *options, *arguments])  # fmt: skip
    run = folder / f"{kind}_{seed}" / "version_0"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    prefix = "class_gaussians."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    gaussians = ClassGaussians(kept["means"].shape[1], len(kept["counts"]), **KINDS[kind])
    gaussians.load_state_dict(kept)
    return gaussians, json.loads((run / "results.json").read_text())["last_accuracy"]


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure, print, and return what was measured of each kind."""
    given = parser(__doc__)
    given.add_argument("--root", required=True, help="folder of Fashion-MNIST")
    given.add_argument("--features", required=True, help="folder of the feature cache")
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, others = given.parse_known_args(arguments)
    others += [f"--data.init_args.root={options.root}", f"--data.init_args.feature_cache.folder={options.features}"]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        full: list[torch.Tensor] = []
        for kind in KINDS:
            learnt = [learn(kind, seed, Path(folder), others) for seed in options.seeds]
            gaussians = learnt[0][0]
            covariances = [gaussians.covariance_of(label) for label in range(gaussians.num_classes)]
            full = full or covariances
            errors = [float((one - exact).norm() / exact.norm()) for one, exact in zip(covariances, full, strict=True)]
            rows[kind] = {
                "bytes": sum(value.numel() * value.element_size() for value in gaussians.buffers()),
                "mean error": sum(errors) / len(errors),
                "largest error": max(errors),
                "last accuracy": sum(accuracy for _, accuracy in learnt) / len(learnt),
            }
    print("| covariance | MB | mean error | largest error | last accuracy |\n|---|---|---|---|---|")
    for kind, row in rows.items():
        print(f"| {kind} | {row['bytes'] / 1e6:.1f} | {row['mean error']:.3f} | {row['largest error']:.3f} "
              f"| {row['last accuracy']:.4f} |")  # fmt: skip
    report(options, rows=rows)
    return rows


if __name__ == "__main__":
    main()
