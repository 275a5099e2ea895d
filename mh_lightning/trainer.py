"""The trainer of streams, which Python and the command line share, and a fit in one line."""

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import (
    _EVALUATE_OUTPUT,
    _PREDICT_OUTPUT,
    EVAL_DATALOADERS,
    TRAIN_DATALOADERS,
)

from mh_lightning import callbacks as stream_callbacks
from mh_lightning.callbacks.run import is_trial, run_folder
from mh_lightning.compat.lightning_names import PathLike, PluginInput
from mh_lightning.data import StreamDataModule
from mh_lightning.errors import UserError
from mh_lightning.methods import ContinualMethod
from mh_lightning.random_numbers import global_seed
from mh_lightning.results import Results
from mh_lightning.resuming import logged_rows
from mh_lightning.run_folders import (
    CHECKPOINTS,
    LAST,
    RUN_DIR,
    check_checkpoint,
    chosen_checkpoint,
    locked,
    new_version,
    newest_fit,
)

DEFAULT_SEED = 0
FIRST = stream_callbacks.TaskBoundaries  # of all callbacks, since it prepares what others look at
LATER: tuple[type[Callback], ...] = (
    stream_callbacks.CostMonitor,
    stream_callbacks.ContinualMetrics,
    stream_callbacks.HyperParameters,
    stream_callbacks.MemoryHeadMonitor,
    stream_callbacks.TaskCheckpoints,
    stream_callbacks.PredictionWriter,
)
PICTURES = (stream_callbacks.StreamPreview, stream_callbacks.OnlineAccuracy, stream_callbacks.DecisionSurfaces)
# each is expected here: the run folder is made before its loggers, and a frozen backbone stays in evaluation mode
EXPECTED_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",
    r"Found \d+ module\(s\) in eval mode",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "The `srun` command is available",
    "`LightningModule.configure_optimizers` returned `None`",  # of closed-form methods
    "You are using a custom batch sampler `StreamBatchSampler`",
)


class Trainer(lightning.pytorch.Trainer):
    """Lightning's trainer for a stream of tasks: the number of epochs follows from the stream, each run has a folder of
    its own, and the callbacks of continual learning (`mh_lightning.callbacks`) are there unless one of their kind is
    given. All else is as in `lightning.pytorch.Trainer`.

    A fit writes into ``<run_dir>/<experiment>/version_N``: results.json, metrics.csv, TensorBoard's logs, pictures and
    checkpoints. ``fit(…, ckpt_path="last")`` goes on with the newest fit of the experiment, in its folder; any other
    path begins a new one. An evaluation after a fit uses its folder; before one, it makes its own. Checkpoints are
    loaded with ``weights_only=True``, always.

    Where no seed was set (`lightning.seed_everything`), a fit sets seed 0. To get the same numbers again, or those of
    the command line, set it before the method is made, since its backbone may draw its weights.

    Args:
        run_dir: folder under which the run folder is made; `default_root_dir` is another name for it.
        experiment: name of the experiment, by default "experiment".
        pictures: draw figures into the run folder and TensorBoard; many short runs are faster without.
        callbacks: in addition to those of continual learning, or in place of those of the same kind.
        logger: by default TensorBoard's and a CSV file, in the run folder.
        plugins: as in Lightning.
        default_root_dir: see `run_dir`.
        max_epochs: follows from the stream; leave it out.
        num_sanity_val_steps: batches of evaluation before the fit.
        reload_dataloaders_every_n_epochs: must be 1, since each task has its own data.
        use_distributed_sampler: must be false, since the stream shares batches among ranks itself.
        log_every_n_steps: of the training curves, since to log takes longer than a small step; by default a tenth of an
            epoch, but at most ten, and each chunk of a stream that has chunks.
        options: of `lightning.pytorch.Trainer`.

    Raises:
        UserError: if options cannot be used.

    Example:
        >>> import tempfile, torch, mh_lightning
        >>> from mh_lightning.data import Tensors
        >>> from mh_lightning.methods import FineTuning
        >>> x, y = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
        >>> stream = Tensors(x, y, x, y, increment=2)
        >>> trainer = mh_lightning.Trainer(run_dir=tempfile.mkdtemp(), logger=False, enable_progress_bar=False,
        ...                                enable_model_summary=False, accelerator="cpu", pictures=False)
        >>> trainer.fit(FineTuning(torch.nn.Identity(), torch.nn.Linear), datamodule=stream)  # doctest: +ELLIPSIS
        Task 1 of 2: ...
        >>> trainer.run_folder.name, sorted(path.name for path in trainer.run_folder.iterdir())
        ('version_0', ['checkpoints', 'results.json'])
    """

    def __init__(
        self,
        *,
        run_dir: str | Path = RUN_DIR,
        experiment: str | None = None,
        pictures: bool = True,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        plugins: PluginInput | list[PluginInput] | None = None,
        default_root_dir: PathLike | None = None,
        max_epochs: int | None = -1,
        num_sanity_val_steps: int | None = 0,
        reload_dataloaders_every_n_epochs: int = 1,
        use_distributed_sampler: bool = False,
        log_every_n_steps: int | None = None,
        **options: Any,
    ) -> None:
        self.configuration: dict[str, Any] = {}  # of the command line
        self.chooses_log_steps = log_every_n_steps is None
        self.resumes = False  # whether the fit is the rest of one
        self.run_folder: Path | None = None  # of the newest run, on rank 0; others are told when they ask for it
        self.experiment_folder = one_run_dir(run_dir, default_root_dir) / name_of_experiment(experiment)
        self._own_loggers = logger in (None, True)
        super().__init__(
            callbacks=_with_defaults(callbacks, pictures, options),
            logger=False if self._own_loggers else logger,
            plugins=_with_atomic_checkpoints(plugins),
            max_epochs=max_epochs,
            num_sanity_val_steps=num_sanity_val_steps,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            use_distributed_sampler=use_distributed_sampler,
            log_every_n_steps=1
            if self.chooses_log_steps
            else log_every_n_steps,  # until the length of an epoch is known
            **options,
        )

    @property
    def default_root_dir(self) -> str:
        """The run folder, or the experiment's before there is one."""
        return str(self.run_folder or self.experiment_folder)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: PathLike | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Learn a stream.

        Args:
            model: the method, a `ContinualMethod`.
            train_dataloaders: the stream, if it is not given as the datamodule.
            val_dataloaders: none; the stream has its own.
            datamodule: the stream, a `StreamDataModule`.
            ckpt_path: a checkpoint to go on from, or "last" for the newest one of the experiment's newest fit.
            weights_only: always true: untrusted files never execute code.

        Raises:
            UserError: if something cannot be used.
        """
        if self.fit_loop.epoch_progress.current.ready and ckpt_path is None:
            raise UserError("This trainer has learnt a stream already; make a new mh_lightning.Trainer for each fit.")
        if global_seed() is None:
            seed_everything(DEFAULT_SEED)
        stream = datamodule if datamodule is not None else train_dataloaders
        self.resumes = ckpt_path is not None
        with self._in_folder_of_fit(ckpt_path, getattr(stream, "chunk_size", None) is not None) as checkpoint:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, checkpoint, _safely(weights_only))

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        ckpt_path: PathLike | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> _EVALUATE_OUTPUT:
        """Evaluate on the samples of all tasks, validation samples included, and return what callbacks see; see
        `fit`.
        """
        with self._in_folder_of_evaluation(ckpt_path) as checkpoint:
            super().validate(model, dataloaders, checkpoint, verbose, datamodule, _safely(weights_only))
        return [{name: float(value) for name, value in self.callback_metrics.items()}]

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        ckpt_path: PathLike | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> _EVALUATE_OUTPUT:
        """Evaluate on the test samples of all tasks, and return what callbacks see; see `fit`."""
        with self._in_folder_of_evaluation(ckpt_path) as checkpoint:
            super().test(model, dataloaders, checkpoint, verbose, datamodule, _safely(weights_only))
        return [{name: float(value) for name, value in self.callback_metrics.items()}]

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: PathLike | None = None,
        weights_only: bool | None = None,
    ) -> _PREDICT_OUTPUT | None:
        """Class probabilities of the test samples of all tasks; see `fit`."""
        with self._in_folder_of_evaluation(ckpt_path) as checkpoint:
            return super().predict(
                model, dataloaders, datamodule, return_predictions, checkpoint, _safely(weights_only)
            )

    # --- the run folder

    @contextmanager
    def _in_folder_of_fit(self, ckpt_path: PathLike | None, in_chunks: bool) -> Iterator[Path | None]:
        """Choose the run folder, keep other processes out of it, and remove it if the fit is refused."""
        goes_on = newest_fit(self.experiment_folder) if ckpt_path == LAST else None
        checkpoint = chosen_checkpoint(ckpt_path, self.experiment_folder)
        if ckpt_path == LAST and checkpoint is None:
            rank_zero_warn(
                f"ckpt_path=last: there is no checkpoint in {str(self.experiment_folder)!r} yet; the run begins."
            )
        content = None if checkpoint is None else check_checkpoint(checkpoint)
        with ExitStack() as while_running, warnings.catch_warnings():
            self._enter_folder(goes_on)
            assert self.run_folder is not None
            try:
                if _is_first_rank() and not is_trial(self):
                    while_running.enter_context(locked(self.run_folder))
                    for partial in self.run_folder.rglob(".*.tmp"):  # of a run that was killed as it wrote
                        partial.unlink(missing_ok=True)
                    if self.checkpoint_callbacks:  # else there will be nothing to go on from
                        (self.run_folder / CHECKPOINTS).mkdir(exist_ok=True)
                    reached = {name: (content or {}).get(name, 0) for name in ("tasks_trained", "global_step")}
                    for logger in self.loggers:
                        if isinstance(logger, CSVLogger):
                            self._keep_table(logger, None if goes_on is None or content is None else reached, in_chunks,
                                             while_running)  # fmt: skip
                yield checkpoint
            except Exception:
                if goes_on is None:
                    _discard_unused(self.run_folder)
                raise

    @contextmanager
    def _in_folder_of_evaluation(self, ckpt_path: PathLike | None) -> Iterator[Path | None]:
        checkpoint = chosen_checkpoint(ckpt_path, self.experiment_folder)
        if ckpt_path == LAST and checkpoint is None:
            raise UserError(f"ckpt_path=last: there is no checkpoint in {str(self.experiment_folder)!r}; fit first.")
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        new = self.run_folder is None
        with warnings.catch_warnings():
            self._enter_folder(self.run_folder)
            assert self.run_folder is not None
            try:
                yield checkpoint
            except Exception:
                if new:
                    _discard_unused(self.run_folder)
                raise

    def _enter_folder(self, folder: Path | None) -> None:
        """Take a run folder, by default a new one, and log into it."""
        ignore_expected_warnings()
        if not _is_first_rank():
            folder = self.experiment_folder / "version_of_rank_0"  # only named here: rank 0 tells the real one
        self.run_folder = new_version(self.experiment_folder) if folder is None else folder
        if self._own_loggers and not is_trial(self) and not self.loggers:
            place = self.experiment_folder.parent, self.experiment_folder.name, self.run_folder.name
            self.loggers = [TensorBoardLogger(*place), CSVLogger(*place)]

    def _keep_table(
        self, logger: CSVLogger, reached: dict[str, Any] | None, in_chunks: bool, while_running: ExitStack
    ) -> None:
        """Go on with the table of the run that goes on, and leave that of another one, which the logger would remove.

        Raises:
            UserError: if there is one.
        """
        folder = Path(logger.log_dir)
        table = folder / "metrics.csv"
        if folder != self.run_folder:
            folder.mkdir(parents=True, exist_ok=True)
            while_running.enter_context(locked(folder, "trainer.logger"))
        if reached is not None:
            if rows := logged_rows(table, reached, in_chunks):
                logger.experiment.metrics = rows
                logger.save()
        elif folder != self.run_folder and table.exists():
            raise UserError(
                f"trainer.logger: {str(table)!r} is of another run, and CSVLogger would remove it; leave out its "
                "version, or give another save_dir."
            )


def fit(
    method: ContinualMethod, stream: StreamDataModule, *, ckpt_path: str | Path | None = None, **trainer_options: Any
) -> Results:
    """Learn a stream, and return what was found.

    Args:
        method: what learns.
        stream: what is learnt.
        ckpt_path: a checkpoint to go on from, or "last" for the newest one of the experiment's newest fit.
        trainer_options: of `Trainer`.

    Raises:
        UserError: if something cannot be used.

    Example:
        >>> import tempfile, torch, mh_lightning
        >>> from mh_lightning.data import Tensors
        >>> from mh_lightning.heads import ClassMeans
        >>> from mh_lightning.methods import ClosedForm
        >>> x, y = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False, "pictures": False, "logger": False}
        >>> results = mh_lightning.fit(ClosedForm(torch.nn.Identity(), ClassMeans), Tensors(x, y, x, y, increment=2),
        ...                            run_dir=tempfile.mkdtemp(), accelerator="cpu", **quiet)  # doctest: +ELLIPSIS
        Task 1 of 2: ...
        >>> results["average_accuracy"], results["num_tasks"], results.folder.name
        (1.0, 2, 'version_0')
    """
    trainer = Trainer(**trainer_options)
    trainer.fit(method, datamodule=stream, ckpt_path=ckpt_path)
    assert trainer.run_folder is not None
    return Results.of_folder(run_folder(trainer))


def ignore_expected_warnings() -> None:
    """Let what is as it should be pass without a word."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def one_run_dir(run_dir: str | Path, default_root_dir: PathLike | None) -> Path:
    """The trainer's name for the folder of all runs means the same, so that there is one place to look for them."""
    run_dir = Path(run_dir).expanduser()  # as TensorBoard's logger does
    if default_root_dir is None:
        return run_dir
    if str(run_dir) not in (RUN_DIR, str(default_root_dir)):
        raise UserError(
            f"run_dir={str(run_dir)!r} and trainer.default_root_dir={str(default_root_dir)!r} are two names for the "
            "folder under which run folders are made; give one of them."
        )
    return Path(default_root_dir).expanduser()


def name_of_experiment(given: str | None, default: str = "") -> str:
    """The name under which runs are kept.

    Raises:
        UserError: if an empty one is given.
    """
    if given == "":
        raise UserError("experiment is empty; give a name, or leave it out.")
    return given or default or "experiment"


def _with_defaults(given: list[Callback] | Callback | None, pictures: bool, options: dict[str, Any]) -> list[Callback]:
    """The callbacks of a run: those that are given, and of the others those that the trainer's options do not turn
    off.
    """
    given = [given] if isinstance(given, Callback) else list(given or [])
    kinds = [*LATER, *(PICTURES if pictures else ())]
    if options.get("enable_checkpointing") is False:
        kinds.remove(stream_callbacks.TaskCheckpoints)
    missing = [kind for kind in kinds if not any(isinstance(one, kind) for one in given)]
    added = [
        stream_callbacks.ContinualMetrics(pictures) if kind is stream_callbacks.ContinualMetrics else kind()
        for kind in missing
    ]
    if options.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
        added.append(stream_callbacks.TaskProgressBar())
    first = [] if any(isinstance(one, FIRST) for one in given) else [FIRST()]
    return [*first, *given, *added]


def _with_atomic_checkpoints(plugins: Any) -> list[Any]:
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins else []
    if SLURMEnvironment.detect() and not any(isinstance(one, ClusterEnvironment) for one in plugins):
        # the trainer's own requeueing saves in the middle of a step; TaskCheckpoints minds SIGTERM
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return [*plugins, stream_callbacks.AtomicCheckpointIO()]


def _safely(weights_only: bool | None) -> bool:
    if weights_only is False:
        raise UserError("weights_only=False would let a checkpoint run code; leave it out.")
    return True


def _is_first_rank() -> bool:
    """As far as the environment tells before the processes meet."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def _discard_unused(folder: Path) -> None:
    """A run that was refused before it trained leaves nothing."""
    if not any(folder.glob(f"{CHECKPOINTS}/*")) and not (folder / "metrics.csv").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # there are others
            folder.parent.rmdir()
