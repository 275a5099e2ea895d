"""A callback: Lightning's hooks, with the tasks of the stream; here a curve of each class's weight norm."""

from lightning.pytorch import Callback, Trainer

from mh_lightning.callbacks.run import current_task, ends_task
from mh_lightning.methods import ContinualMethod


class HeadNorms(Callback):
    def __init__(self, parameter: str = "weight") -> None:
        self.parameter = parameter

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ContinualMethod) -> None:
        if not ends_task(trainer):
            return
        norms = pl_module.head.get_parameter(self.parameter).detach().norm(dim=1).tolist()
        names = pl_module.stream.class_names
        for logger in trainer.loggers:
            curves = {f"head_norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
            logger.log_metrics(curves, current_task(trainer) + 1)
