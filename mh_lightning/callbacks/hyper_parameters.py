"""What a run was told and what it reached, side by side with other runs in TensorBoard."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from mh_lightning.callbacks.run import is_trial, stream_of
from mh_lightning.compat.lightning_names import write_summary
from mh_lightning.option_roles import leaves

SHOWN = ("seed_everything", "model.", "data.")  # of a configuration
SHOWN_OF_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "devices")


class HyperParameters(Callback):
    """Fills TensorBoard's HParams tab at the end of a fit: a row a run, its options and its final metrics, to be
    sorted, filtered and drawn against each other.

    On the command line the options are those of the configuration; in Python those that the stream, the optimizer and
    the trainer are known by. Values that are neither numbers nor names are shown as text.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        loggers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if is_trial(trainer) or not trainer.is_global_zero or not metrics or not loggers:
            return
        configuration = getattr(trainer, "configuration", None)
        options = dict(of_configuration(configuration) if configuration else of_objects(trainer, pl_module))
        told = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in options.items()}
        for logger in loggers:
            for summary in hparams(told, metrics):  # type: ignore[no-untyped-call]
                write_summary(logger, summary)


def of_configuration(configuration: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of a configuration that tell runs apart, by their dotted names; what is null is left out.

    Example:
        >>> dict(of_configuration({"data": {"class_path": "x.Digits", "init_args": {"increment": 2}}, "trainer": {}}))
        {'data': 'Digits', 'data.increment': 2}
    """
    for name, value in leaves(configuration):
        trainer_option = name.startswith("trainer.") and name.removeprefix("trainer.") in SHOWN_OF_TRAINER
        if value is None or not (name.startswith(SHOWN) or trainer_option):
            continue
        if name.endswith(".class_path"):
            yield name.removesuffix(".class_path").replace(".init_args", ""), str(value).rpartition(".")[2]
        else:
            yield name.replace(".init_args", ""), value


def of_objects(trainer: Trainer, method: Any) -> Iterator[tuple[str, Any]]:
    """The same, of what a script has made."""
    stream = stream_of(trainer)
    yield "model", type(method).__name__
    yield "model.backbone", getattr(method.backbone, "name", type(method.backbone).__name__)
    yield "model.head", f"{type(method.head).__name__}({method.head.extra_repr()})"
    for name, value in method.optimizer_settings.items():
        yield f"model.optimizer.{name}", value
    yield "data", type(stream).__name__
    for name, value in stream.state_dict().items():
        if value is not None and name not in ("class_groups", "seed_everything"):
            yield f"data.{name}", value
    yield "seed_everything", stream.state_dict()["seed_everything"]
    yield "trainer.precision", trainer.precision
