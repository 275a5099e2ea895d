"""Task boundaries, and the progress bar that tells where in the stream a run is."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn

from mh_lightning.callbacks.averaging import keep_what_is_no_average, prepare_averaging
from mh_lightning.callbacks.run import current_task, ends_task, is_trial, starts_task, stream_of
from mh_lightning.distributed import of_all_ranks
from mh_lightning.errors import UserError, require
from mh_lightning.option_roles import is_same_option
from mh_lightning.random_numbers import global_seed, put_generators_back, seed_all, state_of_generators

DAMAGED_GENERATORS = "ckpt_path: the checkpoint's states of the random generators are damaged; give another checkpoint."
POINTS_OF_AN_EPOCH = 10  # of a training curve
MOST_LOG_STEPS = 10  # from one point to the next


class TaskBoundaries(Callback):
    """Lays the stream out over the epochs of one fit, and tells the method where tasks start and end.

    The number of epochs follows from the stream, and evaluation takes place after each task, or after every so many,
    as `StreamDataModule.evaluate_every_n_tasks` says. At the start of a task the optimizer and the scheduler are made
    anew if the method asks for it.

    Each epoch draws its own random numbers, from the seed, its number and the rank. Where the generators of all ranks
    are is part of every checkpoint, so that a run goes on in the middle of an epoch, too.

    With Lightning's `WeightAveraging` and `EMAWeightAveraging`, averages are evaluated after each task, and the run
    ends with them: of trained weights, keys and scales of Memory Heads, and BatchNorm in a trained backbone. Counters,
    replay buffers and what is frozen are those of the last step. `StochasticWeightAveraging` averages parameters
    alone, and takes effect after the last evaluation: ``last.ckpt`` then holds the average.
    """

    def __init__(self) -> None:
        self._generators: dict[str, Any] | None = None  # of this rank, until training starts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the trainer's number of epochs and its rhythm of evaluation."""
        prepare_averaging(trainer, pl_module, self)
        if stage != "fit":
            return
        stream, loop = stream_of(trainer), trainer.fit_loop
        epochs = stream.num_tasks * stream.epochs_per_task
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if reload != 1:
            raise UserError(
                f"trainer.reload_dataloaders_every_n_epochs must be 1, since each task has its own data; got {reload}."
            )
        for name, allowed, reason in (
            ("val_check_interval", (None, 1.0), "data.evaluate_every_n_tasks says when evaluations take place"),
            (
                "check_val_every_n_epoch",
                (1, stream.epochs_per_task, epochs),
                "it follows from data.epochs_per_task and data.evaluate_every_n_tasks",
            ),
            ("limit_val_batches", (None, 0, 0.0, 1.0), "data.max_test_samples takes a part of each class"),
        ):
            value = getattr(trainer, name, "a duration")  # which Lightning keeps elsewhere
            if not any(is_same_option(value, one) for one in allowed) and not is_trial(trainer):
                raise UserError(f"trainer.{name}={value}: leave it out, {reason}.")
        require("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, at_least=1)
        if trainer.max_epochs in (-1, None):
            loop.max_epochs = epochs
        elif trainer.max_epochs != epochs and not is_trial(trainer):
            raise UserError(
                f"trainer.max_epochs={trainer.max_epochs} contradicts the stream's {stream.num_tasks} tasks "
                f"of {stream.epochs_per_task} epochs; leave it out, it follows from them."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where in the stream the run is, and where the generators of all ranks are."""
        keep_what_is_no_average(trainer, pl_module)
        epochs: Any = trainer.fit_loop.epoch_progress.total
        inside = epochs.processed < epochs.started
        checkpoint["tasks_trained"] = epochs.processed // stream_of(trainer).epochs_per_task
        checkpoint["batches_done"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready if inside else 0
        checkpoint["generators"] = of_all_ranks(state_of_generators(trainer.strategy.root_device))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell the stream where it goes on, and keep where this rank's generators were until training starts."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get("generators")
        if not isinstance(saved, list) or not saved:
            raise UserError(DAMAGED_GENERATORS)
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # the stream can
        stream_of(trainer).batches_done = checkpoint.get("batches_done", 0)
        self._generators = saved[trainer.global_rank] if trainer.global_rank < len(saved) else None
        if len(saved) != trainer.world_size:
            rank_zero_warn(
                f"ckpt_path: the checkpoint is of {len(saved)} processes and this run has {trainer.world_size}: the "
                "order of the stream, buffers and counts go on as they were, but sums are rounded differently and "
                "ranks draw other random numbers (dropout), so that results are no longer the same bit for bit."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where a resumed run goes on, and tell the trainer when to evaluate, since it may be inside an epoch."""
        _choose_evaluation(trainer)
        _choose_log_steps(trainer)
        stream, batches = stream_of(trainer), stream_of(trainer).batches_done
        epoch, all_batches = trainer.current_epoch, int(trainer.num_training_batches)
        if batches and batches == all_batches:
            raise UserError(
                "ckpt_path: the checkpoint was saved after the last batch of an epoch and before its end, where a "
                "run cannot be taken up; give one of mh_lightning.callbacks.TaskCheckpoints, or another one."
            )
        if batches not in range(max(all_batches, 1)):
            raise UserError(
                f"ckpt_path: the checkpoint's batches_done must be among the {all_batches} of an epoch, got {batches}; "
                "it is damaged."
            )
        if (epoch or batches) and epoch < stream.num_tasks * stream.epochs_per_task:
            after = f", after batch {batches} of {all_batches}" if batches else ""
            pl_module.print(
                f"Going on with task {current_task(trainer) + 1} of {stream.num_tasks}, "
                f"epoch {epoch % stream.epochs_per_task + 1} of {stream.epochs_per_task}{after}"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce and prepare a task at its first epoch."""
        _choose_evaluation(trainer)
        _choose_log_steps(trainer)
        self._go_on_drawing(trainer)
        seed = global_seed()
        if seed is not None:
            seed_all(seed, trainer.current_epoch, trainer.global_rank)
        if not starts_task(trainer):
            return
        stream, method, task = stream_of(trainer), _method(pl_module), current_task(trainer)
        pl_module.print(
            f"Task {task + 1} of {stream.num_tasks}: {stream.name_of_task(task)} "
            f"({stream.num_samples('train', task)} samples)"
        )
        if method.reset_optimizer and task > 0:
            trainer.strategy.setup_optimizers(trainer)
        method.on_task_start(task)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate no average of what has none."""
        keep_what_is_no_average(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with no average of what has none."""
        keep_what_is_no_average(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on in the middle of an epoch."""
        self._go_on_drawing(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Later epochs begin at their first batch."""
        stream_of(trainer).batches_done = 0

    def _go_on_drawing(self, trainer: Trainer) -> None:
        if self._generators is None:
            return
        try:
            put_generators_back(self._generators, trainer.strategy.root_device)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(DAMAGED_GENERATORS) from error
        self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the method that a task ends, before it is evaluated."""
        if trainer.is_last_batch and ends_task(trainer):
            _method(pl_module).share_buffers()
            _method(pl_module).on_task_end(current_task(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the method as a run that ended leaves it."""
        pl_module.on_fit_end()
        _method(pl_module).leave_stream()


def _choose_evaluation(trainer: Trainer) -> None:
    """Evaluate at the end of the current task, or at no end before that of the stream."""
    stream = stream_of(trainer)
    tasks = 1 if stream.evaluates_after(current_task(trainer)) else stream.num_tasks
    trainer.check_val_every_n_epoch = tasks * stream.epochs_per_task


def _choose_log_steps(trainer: Trainer) -> None:
    """Ten points of a curve for each epoch, if nothing else was asked for, and one for at most ten steps."""
    if getattr(trainer, "chooses_log_steps", False):
        chunks = stream_of(trainer).chunk_size is not None
        tenth = 1 if chunks else int(trainer.num_training_batches) // POINTS_OF_AN_EPOCH
        trainer.log_every_n_steps = max(1, min(MOST_LOG_STEPS, tenth))  # type: ignore[attr-defined]


def _method(pl_module: LightningModule) -> Any:
    return pl_module


class TaskProgressBar(TQDMProgressBar):
    """Progress bar that says task i of T.

    Args:
        refresh_rate: steps from one drawing to the next, at least 1.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows, without the version of the run folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the task and the epoch in front of the bar."""
        super().on_train_epoch_start(trainer)
        stream = stream_of(trainer)
        task, epoch = divmod(trainer.current_epoch, stream.epochs_per_task)
        self.train_progress_bar.set_description(
            f"Task {task + 1} of {stream.num_tasks}, epoch {epoch + 1} of {stream.epochs_per_task}"
        )
