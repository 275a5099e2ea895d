"""The command line: ``mh-lightning fit|validate|test|predict --config experiment.yaml``."""

import atexit
import json
import os
import signal
import sys
import threading
from argparse import ArgumentError
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mh_lightning.config_files import MODE, check_nulls, check_values
from mh_lightning.config_sets import check_together, name_of, with_classes_first
from mh_lightning.data import StreamDataModule
from mh_lightning.distributed import in_process_group, leave_process_group
from mh_lightning.errors import UserError, require, writing
from mh_lightning.inference.loading import checkpoint_of, go_on
from mh_lightning.library_errors import sentence_of
from mh_lightning.methods import ContinualMethod
from mh_lightning.methods.description import check_described
from mh_lightning.packaged import config_files, with_packaged
from mh_lightning.resuming import check_configuration
from mh_lightning.run_folders import CHECKPOINTS, LAST, RUN_DIR, check_checkpoint, chosen_checkpoint
from mh_lightning.threads import use_threads
from mh_lightning.trainer import Trainer, ignore_expected_warnings, name_of_experiment, one_run_dir

STOPPED_BY_SIGTERM, STOPPED_BY_CTRL_C = 128 + signal.SIGTERM, 128 + signal.SIGINT
MOST_THREADS = 1024  # OpenMP crashes where the system gives it no more
BESIDE_TRAINER = ("run_dir", "experiment", "pictures")  # options of the trainer that stand beside `trainer`
PARSER = {"exit_on_error": False, "parser_mode": MODE}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, which runs again as it is, shows it in TensorBoard, and puts it into checkpoints."""

    def on_save_checkpoint(
        self, trainer: lightning.pytorch.Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the run was configured with."""
        checkpoint["configuration"] = self._text

    @cached_property
    def _text(self) -> str:
        text: str = self.parser.dump(self.config, skip_none=False)
        return text

    def save_config(self, trainer: lightning.pytorch.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the configuration in TensorBoard."""
        folder = Path(trainer.default_root_dir)  # only rank 0 comes here, and knows the folder
        path = folder / self.config_filename
        if self.config.get("ckpt_path") == LAST:
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
        try:
            self._run(args)
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
        trainer: Trainer | None = getattr(self, "trainer", None)
        if trainer is None or trainer.run_folder is None:
            return "nothing had begun; give the same command again"
        if any((trainer.run_folder / CHECKPOINTS).glob("*.ckpt")):
            return "the same command with --ckpt_path last goes on"
        return "there is no checkpoint yet, so the same command begins anew"

    def _run(self, args: ArgsType) -> None:
        super().__init__(
            ContinualMethod,
            StreamDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs=dict.fromkeys(self.subcommands(), PARSER) | PARSER,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As in Lightning, with the trainer's options of the run folder beside it, see below."""
        skip: set[str | int] = {*BESIDE_TRAINER}
        parser.add_class_arguments(
            Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=skip
        )
        parser.add_lightning_class_args(ContinualMethod, "model", subclass_mode=True)
        parser.add_lightning_class_args(StreamDataModule, "data", subclass_mode=True)

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
            "--continue_from",
            type=str | None,
            default=None,
            help="Run folder or checkpoint whose model learns more: further tasks, with classes that it knows or not.",
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
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        self._experiment_is_asked = any(word.partition("=")[0] == "--experiment" for word in words)
        check_together([file for file in config_files(words) if file.is_file()])  # before the parser mixes them
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
        require("seed_everything", seed if isinstance(seed, int) else str(seed), at_least=0, below=2**32)
        self._name_run_folder()
        self._check_checkpoint()

    def _name_run_folder(self) -> None:
        config = self.config[self.config.subcommand]
        config.run_dir = str(one_run_dir(config.run_dir, config.trainer.default_root_dir))
        config.trainer.default_root_dir = None
        files = [Path(str(file)) for file in config.get("config") or [] if file is not None]  # None is YAML in a word
        if config.experiment and len(files) > 1 and not self._experiment_is_asked:  # by a saved configuration
            others = [Path(config.experiment), *(file for file in files if file.stem != "config")]
            config.experiment = name_of(others)
        config.experiment = name_of_experiment(config.experiment, name_of(files))

    def _check_checkpoint(self) -> None:
        """Read the checkpoint that is asked for, and compare its configuration if it is to be gone on with."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if config.ckpt_path is None:
            if subcommand != "fit":
                rank_zero_warn(f"{subcommand} without --ckpt_path uses a model that was not trained.")
            return
        config.ckpt_path = str(config.ckpt_path)
        checkpoint = chosen_checkpoint(config.ckpt_path, Path(config.run_dir) / config.experiment)
        if subcommand != "fit" or checkpoint is None:
            return
        content = check_checkpoint(checkpoint)
        if "configuration" in content:
            own = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[subcommand]
            check_configuration(content["configuration"], own)

    def before_fit(self) -> None:
        """Take over what another run has learnt."""
        source = self._get(self.config_init, "continue_from")
        if source is not None:
            go_on(self.model, source)

    def before_instantiate_classes(self) -> None:
        """Choose the number of threads."""
        config = self.config[self.subcommand]
        port = os.environ.get("MASTER_PORT", "0")
        if not port.isdecimal() or int(port) >= 2**16:
            raise UserError(f"The environment variable MASTER_PORT must be a port from 0 to 65535, got {port!r}.")
        if config.num_threads is not None:
            require("num_threads", config.num_threads, at_least=1, at_most=MOST_THREADS)
            use_threads(config.num_threads)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.pytorch.Trainer:
        """Hand on the options of the run folder."""
        options = {name: self._get(self.config_init, name) for name in BESIDE_TRAINER}
        try:
            trainer = super().instantiate_trainer(**options, **kwargs)
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"trainer: {error}") from error
        if isinstance(trainer, Trainer):
            trainer.configuration = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        return trainer


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
        cli = _ConfigurationOnly(["fit", *with_classes_first(with_packaged(arguments))])
    except (ValueError, ArgumentError) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error
    configuration: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]
    return configuration


def in_order(words: list[str]) -> list[str]:
    """The words of a command as the parser needs them: configurations, and what names a class, first."""
    return with_model_of_parent(with_classes_first(with_packaged(words)))


def with_model_of_parent(words: list[str]) -> list[str]:
    """The words of a command, and where it continues a run, that run's model, which later words may change.

    Raises:
        UserError: if the run has no checkpoint, or its model was made in Python of objects without a description.
    """
    words = [word.replace("--continue-from", "--continue_from", 1) for word in words]
    places = [place for place, word in enumerate(words) if word.partition("=")[0] == "--continue_from"]
    if not places:
        return words
    value = words[places[-1]].partition("=")[2] or next(iter(words[places[-1] + 1 :]), "")
    if words[0] != "fit":
        raise UserError(f"continue_from is for fit; {words[0]} takes --from.")
    model = check_checkpoint(checkpoint_of(Path(value)), option="continue_from")["model"]
    check_described(model, (), "continue_from")
    parts = model.get("init_args", {})
    if parts.get("backbone") is None or parts.get("head", 0) is None:
        raise UserError(
            "continue_from: the run was made in Python of objects that no configuration describes; go on in Python, "
            "with mh_lightning.load and mh_lightning.fit."
        )
    return [words[0], f"--model={json.dumps(model)}", *words[1:]]


def with_folder(sentence: str, args: Any) -> str:
    """Name the folder in which a file was looked for that a configuration names.

    Example:
        >>> with_folder("--model.backbone: no such file as 'x.yaml' (see --help).", ["fit", "--config", "/a/b.yaml"])
        "--model.backbone: no such file as 'x.yaml' in '/a' or the working directory."
    """
    if "no such file as '" not in sentence or not isinstance(args, list | tuple):
        return sentence
    folders = " or ".join(sorted({repr(str(file.resolve().parent)) for file in config_files([*map(str, args)])}))
    place = f" in {folders} or the working directory" if folders else " in the working directory"
    return sentence.replace(" (see --help)", place)


class _Stopped(BaseException):
    """A signal ended the run."""

    def __init__(self, exit_code: int, how_to_go_on: str) -> None:
        super().__init__(exit_code, how_to_go_on)
        self.exit_code, self.how_to_go_on = exit_code, how_to_go_on


def _exit_code_of_signal(error: BaseException) -> int | None:
    if isinstance(error, Exception):
        return None
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
    ignore_expected_warnings()
    if not torch.cuda.is_available():
        # Lightning makes torch look for GPUs by NVML; where there is none, each step of Adam would search that library
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    previous = threading.excepthook
    broken: list[BaseException] = []  # where TensorBoard's writer cannot write, its thread ends
    threading.excepthook = lambda ended: broken.append(ended.exc_value or SystemExit())
    try:
        if args is None:
            sys.argv[1:] = in_order(sys.argv[1:])  # from there other ranks are started, too
        StreamCLI(in_order(args) if isinstance(args, list) else args)
        for error in broken:
            raise error
        if in_process_group():  # a script may call `main` again, in the same group
            atexit.unregister(leave_process_group)
            atexit.register(leave_process_group)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:  # a bug
            raise
        sentence = with_folder(sentence, sys.argv[1:] if args is None else args)
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
