"""Pictures of the stream: what the tasks look like, and how a plane is divided among classes."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import nn

from mh_lightning.callbacks.memory_heads import memory_heads
from mh_lightning.callbacks.plots import Plane, decision_surface_image, decision_surfaces_figure, preview_figure
from mh_lightning.callbacks.reports import evenly_spaced
from mh_lightning.callbacks.run import current_task, is_fitting, is_trial, run_folder, show_figure, stream_of

PREVIEW_TASKS, PREVIEW_SAMPLES = 12, 8
GRID = 160  # points a side
MOST_SURFACES, MOST_SAMPLES = 20, 10_000  # of a stream, and in each


class StreamPreview(Callback):
    """Draws training samples of the first tasks before the fit: ``data_preview.png``, and in TensorBoard. Images are
    shown as they are, after their perturbation and before the backbone's transform; samples of two features as points;
    others are not drawn.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        stream = stream_of(trainer)
        if is_trial(trainer):
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        tasks = range(min(stream.num_tasks, PREVIEW_TASKS))
        pictures = [stream.samples_to_show("train", task, PREVIEW_SAMPLES) for task in tasks]
        names = [stream.name_of_task(task) for task in tasks]
        figure = preview_figure(pictures, names, stream.class_names)
        if figure is not None:
            show_figure(trainer, "data_preview", figure, folder / "data_preview.png")


class DecisionSurfaces(Callback):
    """For streams of two features: after each task, which class each point of the plane is given, with the training
    samples so far and the keys of the first Memory Head; in TensorBoard, and at the end all tasks in
    ``decision_surfaces.png``. Of a stream with more than `MOST_SURFACES` evaluations so many are drawn, evenly spaced,
    and of more than `MOST_SAMPLES` samples every second, every third and so on of each task.
    """

    def __init__(self) -> None:
        self._planes: list[Plane] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the plane after a task."""
        stream, task = stream_of(trainer), current_task(trainer)
        if not is_fitting(trainer) or is_trial(trainer) or not trainer.is_global_zero or not stream.is_plane():
            return
        evaluation, evaluations = (-(-tasks // stream.evaluate_every_n_tasks) for tasks in (task + 1, stream.num_tasks))
        if evaluation - 1 not in evenly_spaced(evaluations, MOST_SURFACES):
            return
        step = -(-sum(stream.num_samples("train", earlier) for earlier in range(task + 1)) // MOST_SAMPLES)
        parts = [
            tuple(array[::step].copy() for array in stream.samples_to_show("train", earlier, 0))
            for earlier in range(task + 1)
        ]
        samples, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        plane = Plane(
            classes=_classify(trainer, pl_module, extent := stream.extent()),
            extent=extent,
            samples=samples,
            labels=labels,
            keys=keys_in_the_plane(pl_module),
            title=f"after task {task + 1}: {stream.name_of_task(task)}",
        )
        self._planes.append(plane)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                image = decision_surface_image(plane)
                logger.experiment.add_image("decision_surface", image, task + 1, dataformats="HWC")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw all tasks."""
        if is_trial(trainer) or not stream_of(trainer).is_plane():
            return
        folder = run_folder(trainer)
        if self._planes:
            names = stream_of(trainer).class_names
            figure = decision_surfaces_figure(self._planes, names)
            show_figure(trainer, "decision_surfaces", figure, folder / "decision_surfaces.png")

    def state_dict(self) -> dict[str, Any]:
        """The planes so far, as plain tensors and values."""
        return {"planes": [plane.as_plain() for plane in self._planes]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._planes = [Plane.from_plain(plain) for plain in state_dict["planes"]]


@torch.no_grad()
def _classify(
    trainer: Trainer, pl_module: LightningModule, extent: tuple[float, float, float, float]
) -> NDArray[np.int64]:
    """Classes (GRID, GRID) of the points of a grid, rows from bottom to top."""
    left, right, bottom, top = extent
    y, x = torch.meshgrid(torch.linspace(bottom, top, GRID), torch.linspace(left, right, GRID), indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], dim=1).to(pl_module.device)
    with trainer.precision_plugin.forward_context():
        logits = pl_module(trainer.precision_plugin.convert_input(points))
    classes: NDArray[np.int64] = logits.argmax(dim=1).view(GRID, GRID).cpu().numpy()
    return classes


def keys_in_the_plane(pl_module: nn.Module) -> NDArray[np.float32]:
    """Keys (units, 2) that lie in the plane; none if there is no such Memory Head."""
    for layer in memory_heads(pl_module).values():
        keys = layer.K.flatten(0, 1)
        if keys.shape[1] == 2 and layer.distance == "euclidean" and layer.psi_fn == "identity":
            placed: NDArray[np.float32] = keys.detach().float().cpu().numpy().copy()  # they move on
            return placed
    return np.zeros((0, 2), np.float32)
