"""The command line: ``mh-lightning fit|validate|test|predict --config experiment.yaml``."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mh_lightning import callbacks
from mh_lightning.data import StreamDataModule
from mh_lightning.errors import UserError
from mh_lightning.methods import ContinualMethod

DEFAULT_CALLBACKS = (
    callbacks.TaskBoundaries,
    callbacks.ContinualMetrics,
    callbacks.MemoryHeadMonitor,
    callbacks.TaskCheckpoints,
    callbacks.PredictionWriter,
)
TRAINER_DEFAULTS = {
    "max_epochs": -1,  # follows from the stream
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "log_every_n_steps": 5,
}
# the processes that Lightning starts for further devices find rank 0's run folder here
RUN_FOLDER_VARIABLE = "MH_LIGHTNING_RUN_FOLDER"


# each is expected here: the run folder is made before its loggers, and a frozen backbone stays in evaluation mode
EXPECTED_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",
    r"Found \d+ module\(s\) in eval mode",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "The `srun` command is available",
)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, which runs again as it is, and shows it in TensorBoard."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the configuration in TensorBoard."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))


class StreamCLI(LightningCLI):
    """LightningCLI with a run folder, the callbacks of continual learning, and safe loading of checkpoints."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            ContinualMethod,
            StreamDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs",
            help="Folder under which the run folder <experiment>/version_N is made.",
        )
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="Name of the experiment, by default that of the configuration file.",
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Checkpoints are always loaded with weights_only=True, so that is no option."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        checkpoint = kwargs.get("ckpt_path")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise UserError(f"ckpt_path={str(checkpoint)!r} is no file; give one of a run folder's checkpoints/.")
        return {**kwargs, "weights_only": True}

    def before_instantiate_classes(self) -> None:
        """Choose the run folder."""
        config = self.config[self.subcommand]
        if config.experiment is None:
            files = config.get("config") or []
            config.experiment = Path(str(files[-1])).stem if files else "experiment"
        if "LOCAL_RANK" in os.environ and RUN_FOLDER_VARIABLE in os.environ:
            self.run_folder = Path(os.environ[RUN_FOLDER_VARIABLE])
        else:
            self.run_folder = _next_version(Path(config.run_dir) / config.experiment)
            os.environ[RUN_FOLDER_VARIABLE] = str(self.run_folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the loggers, callbacks and the checkpoint writer that the configuration does not replace."""
        config = self._get(self.config_init, "trainer")
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        added: list[Callback] = [
            kind() for kind in DEFAULT_CALLBACKS if not any(isinstance(one, kind) for one in given)
        ]
        if config.get("enable_progress_bar") is not False:
            added.append(callbacks.TaskProgressBar())
        if config.get("logger") in (None, True):
            experiment, version = self.run_folder.parent, self.run_folder.name
            kwargs["logger"] = [
                kind(experiment.parent, experiment.name, version) for kind in (TensorBoardLogger, CSVLogger)
            ]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, callbacks.AtomicCheckpointIO()]
        kwargs["callbacks"] = [*given, *added]
        kwargs["default_root_dir"] = config.get("default_root_dir") or str(self.run_folder)
        return super().instantiate_trainer(**kwargs)


def _next_version(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [
            int(path.name.removeprefix("version_"))
            for path in folder.glob("version_*")
            if path.name.removeprefix("version_").isdecimal()
        ]
        version = folder / f"version_{max(taken, default=-1) + 1}"
        version.mkdir()
    except OSError as error:
        raise UserError(
            f"run_dir: the run folder {str(folder)!r} cannot be made ({error.strerror}); give another --run_dir."
        ) from error
    return version


def main(args: ArgsType = None) -> None:
    """Run the command line; a mistake of the user ends it with one sentence and exit code 2."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        StreamCLI(args)
    except (UserError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
