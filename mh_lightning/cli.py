"""The command line: ``mh-lightning fit|validate|test|predict --config experiment.yaml``."""

import atexit
import os
import shutil
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mh_lightning import callbacks
from mh_lightning.config_files import MODE, check_nulls, check_values
from mh_lightning.data import StreamDataModule
from mh_lightning.distributed import in_process_group, leave_process_group
from mh_lightning.errors import UserError, writing
from mh_lightning.methods import ContinualMethod
from mh_lightning.mistakes import sentence_of
from mh_lightning.resuming import (
    CHECKPOINTS,
    check_checkpoint,
    check_configuration,
    held,
    logged_rows,
    newest_fit,
    newest_whole_checkpoint,
    version_folders,
)
from mh_lightning.threads import use_threads

DEFAULT_CALLBACKS: tuple[type[Callback], ...] = (
    callbacks.TaskBoundaries,  # first of all, since it prepares what others look at
    callbacks.CostMonitor,
    callbacks.ContinualMetrics,
    callbacks.MemoryHeadMonitor,
    callbacks.TaskCheckpoints,
    callbacks.PredictionWriter,
)
LAST = "last"  # as --ckpt_path: the newest checkpoint of the experiment's newest fit
RUN_DIR = "runs"
STOPPED_BY_SIGTERM, STOPPED_BY_CTRL_C = 128 + signal.SIGTERM, 128 + signal.SIGINT
PICTURES = (callbacks.StreamPreview, callbacks.OnlineAccuracy, callbacks.DecisionSurfaces)
TRAINER_DEFAULTS = {
    "max_epochs": -1,  # follows from the stream
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
}


# each is expected here: the run folder is made before its loggers, and a frozen backbone stays in evaluation mode
EXPECTED_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",
    r"Found \d+ module\(s\) in eval mode",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "The `srun` command is available",
    "You are using a custom batch sampler `StreamBatchSampler`",
)


MOST_THREADS = 1024  # OpenMP crashes where the system gives it no more
PARSER = {"exit_on_error": False, "parser_mode": MODE}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, which runs again as it is, shows it in TensorBoard, and puts it into checkpoints."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the run was configured with."""
        checkpoint["configuration"] = self._text

    @cached_property
    def _text(self) -> str:
        text: str = self.parser.dump(self.config, skip_none=False)
        return text

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the configuration in TensorBoard."""
        folder = Path(trainer.default_root_dir)  # only rank 0 comes here, and knows the folder
        path = folder / self.config_filename
        checkpoint = self.config.get("ckpt_path")
        if checkpoint is not None and Path(checkpoint).parent.parent == folder:
            self.config.ckpt_path = None  # the same run goes on, and config.yaml tells how it began
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        text = self._text
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))


class StreamCLI(LightningCLI):
    """LightningCLI with a run folder, the callbacks of continual learning, and safe loading of checkpoints."""

    def __init__(self, args: ArgsType = None) -> None:
        self.run_folder: Path | None = None
        self.resumed_folder: Path | None = None
        self.resumed_at: dict[str, Any] | None = None  # where in the stream, if a fit goes on in its folder
        with ExitStack() as self._while_running:
            try:
                self._run(args)
            except Exception:
                self._discard_empty_run_folder()
                raise
            except BaseException as error:
                exit_code = _exit_code_of_signal(error)
                if exit_code is None:
                    raise
                raise _Stopped(exit_code, self._how_to_go_on()) from error

    def __getstate__(self) -> dict[str, Any]:
        """What the parser hands out to make heads and optimizers later holds the command line; copies of it need what
        was configured, and nothing of the run.
        """
        return {"config_dump": self.config_dump}

    def _how_to_go_on(self) -> str:
        folder = self.run_folder
        if folder is None:
            return "nothing had begun; give the same command again"
        if any((folder / CHECKPOINTS).glob("*.ckpt")):
            return "the same command with --ckpt_path last goes on"
        return "there is no checkpoint yet, so the same command begins anew"

    def _discard_empty_run_folder(self) -> None:
        """A run that was refused before it trained leaves nothing; the folder of an earlier one stays as it is."""
        folder = self.run_folder
        if folder is None or self.resumed_folder is not None:
            return
        if not any(folder.glob(f"{CHECKPOINTS}/*")) and not (folder / "metrics.csv").exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, args: ArgsType) -> None:
        super().__init__(
            ContinualMethod,
            StreamDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs=dict.fromkeys(self.subcommands(), PARSER) | PARSER,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default=RUN_DIR,
            help="Folder under which the run folder <experiment>/version_N is made; also called "
            "trainer.default_root_dir.",
        )
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="Name of the experiment, by default that of the configuration file.",
        )
        parser.add_argument(
            "--pictures",
            type=bool,
            default=True,
            help="Draw figures into the run folder and TensorBoard; many short runs are faster without.",
        )
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of torch, by default its own choice; 1 is fastest for tiny models and batches.",
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Checkpoints are always loaded with weights_only=True, so that is no option."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look at the values and the checkpoint before anything is built."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"config: a file is no text in UTF-8 ({error}); give YAML files.") from error
        config = self.config[self.config.subcommand].as_dict()
        check_values(config)
        check_nulls(config["trainer"], "trainer", Trainer)
        for name in ("model", "data"):
            check_nulls(config[name], name)
        seed = self.config[self.config.subcommand].get("seed_everything")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must lie in [0, 2**32), got {seed}.")
        self._choose_run_dir()
        self._choose_experiment()
        self._choose_checkpoint()

    def _choose_run_dir(self) -> None:
        """The trainer's name for the folder of all runs means the same, so that there is one place to look for them."""
        config = self.config[self.config.subcommand]
        config.run_dir = str(Path(config.run_dir).expanduser())  # as TensorBoard's logger does
        root = config.trainer.default_root_dir
        if root is None:
            return
        if config.run_dir not in (RUN_DIR, str(root)):
            raise UserError(
                f"run_dir={config.run_dir!r} and trainer.default_root_dir={str(root)!r} are two names for the folder "
                "under which run folders are made; give one of them."
            )
        config.run_dir, config.trainer.default_root_dir = str(root), None

    def _choose_experiment(self) -> None:
        config = self.config[self.config.subcommand]
        if not config.experiment and config.experiment is not None:
            raise UserError("experiment is empty; give a name, or leave it out.")
        if config.experiment is None:
            files = config.get("config") or []
            config.experiment = Path(str(files[-1])).stem if files else "experiment"

    def _choose_checkpoint(self) -> None:
        """Read the checkpoint that is asked for, and compare its configuration if it is to be gone on with."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if config.ckpt_path == LAST:
            experiment = Path(config.run_dir) / config.experiment
            newest = newest_fit(experiment)
            config.ckpt_path = newest and newest_whole_checkpoint(newest)
            if subcommand == "fit":
                self.resumed_folder = newest
                if config.ckpt_path is None:
                    rank_zero_warn(
                        f"ckpt_path=last: there is no checkpoint in {str(experiment)!r} yet; the run begins."
                    )
            elif config.ckpt_path is None:
                raise UserError(f"ckpt_path=last: there is no checkpoint in {str(experiment)!r}; fit first.")
        if config.ckpt_path is None:
            if subcommand != "fit":
                rank_zero_warn(f"{subcommand} without --ckpt_path uses a model that was not trained.")
            return
        checkpoint = check_checkpoint(Path(config.ckpt_path))
        config.ckpt_path = str(config.ckpt_path)
        if subcommand == "fit" and "configuration" in checkpoint:
            own = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[subcommand]
            check_configuration(checkpoint["configuration"], own)
        if self.resumed_folder is not None:
            self.resumed_at = {name: checkpoint.get(name, 0) for name in ("tasks_trained", "global_step")}

    def before_instantiate_classes(self) -> None:
        """Choose the run folder."""
        config = self.config[self.subcommand]
        port = os.environ.get("MASTER_PORT", "0")
        if not port.isdecimal() or int(port) >= 2**16:
            raise UserError(f"The environment variable MASTER_PORT must be a port from 0 to 65535, got {port!r}.")
        if config.num_threads is not None:
            if not 1 <= config.num_threads <= MOST_THREADS:
                raise UserError(f"num_threads must lie in 1 to {MOST_THREADS}, got {config.num_threads}.")
            use_threads(config.num_threads)
        experiment = Path(config.run_dir) / config.experiment
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            self.run_folder = experiment / "version_of_rank_0"  # only named here: rank 0 tells the real one
            return
        self.run_folder = self.resumed_folder or _new_version(experiment)
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            self._while_running.enter_context(held(self.run_folder))
            if config.trainer.enable_checkpointing is not False:  # else there will be nothing to go on from
                (self.run_folder / CHECKPOINTS).mkdir(exist_ok=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the loggers, callbacks and the checkpoint writer that the configuration does not replace."""
        config = self._get(self.config_init, "trainer")
        assert self.run_folder is not None
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        kinds: list[type[Callback]] = [
            kind for kind in DEFAULT_CALLBACKS if not any(isinstance(one, kind) for one in given)
        ]
        if config.get("enable_checkpointing") is False:
            kinds = [kind for kind in kinds if kind is not callbacks.TaskCheckpoints]
        pictures = self._get(self.config_init, "pictures")
        if pictures:
            kinds += [kind for kind in PICTURES if not any(isinstance(one, kind) for one in given)]
        added = [
            callbacks.ContinualMetrics(pictures) if kind is callbacks.ContinualMetrics else kind() for kind in kinds
        ]
        if config.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
            added.append(callbacks.TaskProgressBar())
        if config.get("logger") in (None, True):
            experiment, version = self.run_folder.parent, self.run_folder.name
            place: tuple[Any, ...] = (experiment.parent, experiment.name, version)
            kwargs["logger"] = [TensorBoardLogger(*place), CSVLogger(*place)]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if SLURMEnvironment.detect() and not any(isinstance(one, ClusterEnvironment) for one in plugins):
            # the trainer's own requeueing saves in the middle of a step; TaskCheckpoints minds SIGTERM
            plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]
        kwargs["plugins"] = [*plugins, callbacks.AtomicCheckpointIO()]
        first = [one for one in added if isinstance(one, callbacks.TaskBoundaries)]
        kwargs["callbacks"] = [*first, *given, *(one for one in added if one not in first)]
        kwargs["default_root_dir"] = str(self.run_folder)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from error
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, CSVLogger):
                self._keep_table(logger)
        return trainer

    def _keep_table(self, logger: CSVLogger) -> None:
        """Go on with the table of the run that goes on, and leave that of another one, which the logger would remove.

        Raises:
            UserError: if there is one.
        """
        folder = Path(logger.log_dir)
        table = folder / "metrics.csv"
        if folder != self.run_folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._while_running.enter_context(held(folder, "trainer.logger"))
        if self.resumed_at is not None:
            in_chunks = self._get(self.config, "data").init_args.chunk_size is not None
            if rows := logged_rows(table, self.resumed_at, in_chunks):
                logger.experiment.metrics = rows
                logger.save()
        elif folder != self.run_folder and table.exists():
            raise UserError(
                f"trainer.logger: {str(table)!r} is of another run, and CSVLogger would remove it; leave out its "
                "version, or give another save_dir."
            )


def _new_version(folder: Path) -> Path:
    newest = next(iter(version_folders(folder)), None)
    version = folder / f"version_{0 if newest is None else int(newest.name.removeprefix('version_')) + 1}"
    try:
        version.mkdir(parents=True)
    except FileExistsError:
        if version.is_dir():  # another run was faster
            return _new_version(folder)
        raise UserError(f"run_dir: {str(folder)!r} is no folder; give another --run_dir.") from None
    except OSError as error:
        raise UserError(
            f"run_dir: the run folder {str(folder)!r} cannot be made ({error.strerror}); give another --run_dir."
        ) from error
    return version


class _ConfigurationOnly(StreamCLI):
    """Parses and checks what a fit is given, and builds nothing."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": StreamCLI.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """The caller's random state stays as it is."""

    def before_instantiate_classes(self) -> None:
        """Make no run folder."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def resolved_configuration(arguments: list[str]) -> dict[str, Any]:
    """What `main(["fit", *arguments])` would write into config.yaml, before it has chosen its run folder.

    Raises:
        UserError: if the parser refuses the arguments.
    """
    try:
        cli = _ConfigurationOnly(["fit", *arguments])
    except (ValueError, ArgumentError) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error
    configuration: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]
    return configuration


class _Stopped(BaseException):
    """A signal ended the run."""

    def __init__(self, exit_code: int, how_to_go_on: str) -> None:
        super().__init__(exit_code, how_to_go_on)
        self.exit_code, self.how_to_go_on = exit_code, how_to_go_on


def _exit_code_of_signal(error: BaseException) -> int | None:
    if isinstance(error, SIGTERMException):
        return STOPPED_BY_SIGTERM
    # the trainer ends with exit code 1 on Ctrl-C
    by_ctrl_c = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
    return STOPPED_BY_CTRL_C if by_ctrl_c else None


def main(args: ArgsType = None) -> None:
    """Run the command line; a mistake of the user ends it with one sentence and exit code 2.

    Args:
        args: by default those of the process; classes are then found in the working directory, too, whatever the name
            under which the command was started.
    """
    if args is None and not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if not torch.cuda.is_available():
        # Lightning makes torch look for GPUs by NVML; where there is none, each step of Adam would search that library
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    previous = threading.excepthook
    broken: list[BaseException] = []  # where TensorBoard's writer cannot write, its thread ends
    threading.excepthook = lambda ended: broken.append(ended.exc_value or SystemExit())
    try:
        StreamCLI(args)
        for error in broken:
            raise error
        if in_process_group():  # a script may call `main` again, in the same group
            atexit.unregister(leave_process_group)
            atexit.register(leave_process_group)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:  # a bug
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except _Stopped as stopped:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # others must not look as if they had failed
            name = "SIGTERM" if stopped.exit_code == STOPPED_BY_SIGTERM else "Ctrl-C"
            print(f"stopped by {name}; {stopped.how_to_go_on}", file=sys.stderr)
            raise SystemExit(stopped.exit_code) from None
    finally:
        threading.excepthook = previous


if __name__ == "__main__":
    main()
