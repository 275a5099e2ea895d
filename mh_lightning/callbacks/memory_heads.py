"""The inside of Memory Heads, in TensorBoard."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from mh_lightning.callbacks.run import current_task, is_fitting
from mh_lightning.layers import MHLinear


def memory_heads(module: nn.Module) -> dict[str, MHLinear]:
    """All Memory Heads that learn by gradients, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MHLinear)}


class MemoryHeadMonitor(Callback):
    """After each task, for each Memory Head: histograms of the units' usage, age and training samples won, the units
    scrambled so far, and the dead units, which never won a training sample.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write to all loggers; histograms to TensorBoard."""
        if not is_fitting(trainer) or not trainer.is_global_zero:
            return
        task = current_task(trainer) + 1
        for name, layer in memory_heads(pl_module).items():
            scalars = {
                f"memory_head/{name}/scrambles": float(layer.scrambling_count.sum()),
                f"memory_head/{name}/dead_units": float((layer.key_counter == 0).sum()),
            }
            histograms = {"usage": layer.mu, "age": layer.eta, "samples_won": layer.key_counter}
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger):
                    logger.log_metrics({"task": task, **scalars}, trainer.global_step)
                    continue
                for key, value in scalars.items():
                    logger.experiment.add_scalar(key, value, task)
                for key, counts in histograms.items():
                    logger.experiment.add_histogram(f"memory_head/{name}/{key}", counts.float().cpu(), task)
