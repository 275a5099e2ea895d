"""Every touch of a private name of Lightning.

Checked with lightning 2.6.6. The hooks of LightningCLI that `mh_lightning.cli` overrides are not here.
"""

from typing import Any

from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.fabric.utilities.types import _PATH as PathLike  # noqa: N811
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import _PLUGIN_INPUT as PluginInput  # noqa: N811
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from torch.optim.swa_utils import AveragedModel

__all__ = ["PathLike", "PluginInput", "SubprocessScriptLauncher"]


def forget_sigterm(trainer: Trainer) -> None:
    """Let a signal that the trainer has noted not end the run by itself."""
    trainer._signal_connector.received_sigterm = False


def writes_curves(trainer: Trainer) -> bool:
    """Whether what is logged in this step goes to the loggers."""
    return bool(trainer._logger_connector.should_update_logs)


def is_accumulating(trainer: Trainer) -> bool:
    """Whether more micro-batches belong to the step that is under way."""
    return bool(trainer.fit_loop._should_accumulate())


def syncs_batch_norm(trainer: Trainer) -> bool:
    """Whether `sync_batchnorm` was given."""
    return trainer._accelerator_connector._layer_sync is not None


def one_spelling_of_precision(given: Any) -> str | None:
    """``"16-mixed"`` for 16, and so on.

    Raises:
        ValueError: if there is no such precision.
    """
    spelled: str | None = _convert_precision_to_unified_args(given)
    return spelled


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """What a callback averages a model in, once it has begun."""
    averaged: AveragedModel | None = callback._average_model
    return averaged


def averages_models_in_between(strategy: DDPStrategy) -> bool:
    """Whether ranks hold different models between two averages."""
    return strategy._model_averaging_period is not None


def expect_unused_parameters(strategy: DDPStrategy) -> None:
    """Let a step leave parameters out, unless it was said otherwise."""
    strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def write_summary(logger: TensorBoardLogger, summary: Any) -> None:
    """Write what torch's writer has no method for into the events of a run."""
    logger.experiment._get_file_writer().add_summary(summary)
