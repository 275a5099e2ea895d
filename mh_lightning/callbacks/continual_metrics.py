"""After each task: the accuracy matrix and all that follows from it, in the logs, on the screen and in files."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection

from mh_lightning.callbacks.cost import CostMonitor
from mh_lightning.callbacks.earlier_tasks import EarlierTasks
from mh_lightning.callbacks.plots import accuracy_matrix_figure
from mh_lightning.callbacks.reports import (
    accuracy_by_task,
    defined,
    evenly_spaced,
    results_table,
    shortened,
    with_parent,
)
from mh_lightning.callbacks.run import (
    current_task,
    is_fitting,
    is_trial,
    refuse_to_overwrite,
    run_folder,
    save_figure,
    stream_of,
    what_cut_it_short,
)
from mh_lightning.distributed import sum_over_ranks
from mh_lightning.errors import UserError, write_at_once
from mh_lightning.metrics import (
    AccuracyMatrix,
    Calibration,
    Evaluations,
    TaskIncrementalAccuracy,
    continual_metrics,
)
from mh_lightning.metrics.continual import TOP_K
from mh_lightning.metrics.functional import average_accuracy, most_likely
from mh_lightning.random_numbers import global_seed

RESULTS = "results.json"
SECONDS_BETWEEN_FIGURES = 10.0
MOST_CURVES = 100  # of single tasks
LARGEST_LOSS = 1e30  # more is the loss of classes whose logits are masked


class ContinualMetrics(Callback):
    """Evaluates the whole stream after each task, or after every so many, as `StreamDataModule.evaluate_every_n_tasks`
    says, in one pass over the evaluation data; and before the first task, if `StreamDataModule.evaluate_untrained`.

    Writes each metric to the loggers, the matrix as a heat map to TensorBoard, and at the end of the fit
    ``results.json`` and ``accuracy_matrix.png`` into the run folder. A metric of nothing is left out: accuracy on
    earlier tasks after the first one, top-5 accuracy on a stream of five classes or fewer, forward transfer where the
    untrained model was not evaluated. Its state is part of every checkpoint. Of a stream of more than `MOST_CURVES`
    tasks, so many, evenly spaced, have curves of their own in the loggers; results.json has all.

    Calibration is of the samples of the tasks seen so far, after each evaluation.

    All values of an evaluation are in `trainer.callback_metrics`, as ``test/average_accuracy`` and so on, when it ends:
    for `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`, and as what `trainer.test` and `trainer.validate`
    return.

    Args:
        figures: draw heat maps, in TensorBoard after the first and the last task and every ten seconds.
        extra: more metrics by name, functions of `mh_lightning.metrics.Evaluations`.
    """

    def __init__(self, figures: bool = True, extra: dict[str, Callable[[Evaluations], Any]] | None = None) -> None:
        self._figures = figures
        self.extra = extra or {}
        continual_metrics(1, extra=self.extra)  # which refuses names that are taken
        self._metrics: dict[str, MetricCollection] = {}
        self._task_incremental: dict[str, TaskIncrementalAccuracy] = {}
        self._losses: dict[str, Tensor] = {}  # (2, T) for each split: sums and numbers of samples, by task
        self._calibration: dict[str, Calibration] = {}
        self._calibrations: dict[str, list[dict[str, float]]] = {}  # of each evaluation
        self._counts: dict[str, dict[str, Tensor]] = {}  # (evaluations, T) for each split; see _sum_counts
        self._untrained: dict[str, dict[str, Tensor]] = {}  # (T,) for each split
        self._begins_untrained = False
        self._before: list[list[float | None]] | None = None  # accuracies of the run that this one goes on with
        self._seconds_before = 0.0
        self._started = 0.0
        self._drawn: dict[str, float] = {}

    # --- evaluation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the counts, or take them up again; and let the trainer's check before a fit be an
        evaluation of all samples, if the stream wants one.
        """
        refuse_to_overwrite(trainer, RESULTS)
        self._begins_untrained = (
            stream_of(trainer).evaluate_untrained and trainer.ckpt_path is None and not is_trial(trainer)
        )
        if self._begins_untrained:
            trainer.num_sanity_val_steps = math.inf
        self._started = time.monotonic()
        self._before = getattr(pl_module, "parent", {}).get("accuracy_matrix")
        self._prepare(trainer, pl_module)
        if not trainer.is_global_zero:
            return  # ranks are summed, so one of them takes up the counts of the checkpoint
        for split in self._untrained.keys() & self._metrics.keys():
            self._accuracy_matrix(split).go_on_from_untrained(**self._untrained[split])
        for split in self._counts.keys() & self._metrics.keys():
            counts = self._counts[split]
            matrix = self._accuracy_matrix(split)
            rows, tasks = matrix.total.shape
            with_top5 = "last_accuracy_top5" in self._metrics[split]
            needed = {"correct", "total", "correct_of_task", *(["correct_top5"] if with_top5 else [])}
            fits = (
                isinstance(counts, dict)
                and needed <= {*counts}
                and all(
                    isinstance(count, Tensor) and count.dim() == 2 and len(count) <= rows and count.shape[1] == tasks
                    for count in counts.values()
                )
            )
            if not fits:
                raise UserError(
                    f"ckpt_path: the checkpoint's counts of the {split} samples are not one for each evaluation (at "
                    f"most {rows}) and each of the {tasks} tasks; it is damaged."
                )
            matrix.go_on_from(counts["correct"], counts["total"])
            self._task_incremental[split].go_on_from(counts["correct_of_task"], counts["total"])
            if with_top5:
                self._accuracy_matrix(split, "last_accuracy_top5").go_on_from(counts["correct_top5"], counts["total"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a fit, as in `trainer.validate`, the counts start here."""
        if trainer.state.fn == "validate":
            self._prepare(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the counts."""
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = stream_of(trainer)
        splits = ["test"] if trainer.testing else stream.evaluation_splits
        with_top5 = stream.num_classes > TOP_K
        spaced_by = stream.evaluate_every_n_tasks if is_fitting(trainer) else stream.num_tasks
        self._metrics = {
            split: continual_metrics(
                stream.num_tasks, stream.num_evaluated_tasks(split), with_top5, spaced_by, self.extra
            ).to(pl_module.device)
            for split in splits
        }
        self._task_incremental = {
            split: TaskIncrementalAccuracy(
                stream.class_groups, stream.num_classes, stream.num_evaluated_tasks(split), spaced_by
            ).to(pl_module.device)
            for split in splits
        }
        self._losses = {split: torch.zeros(2, stream.num_tasks, device=pl_module.device) for split in splits}
        self._calibration = {split: Calibration().to(pl_module.device) for split in splits}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        if not trainer.sanity_checking or self._begins_untrained:
            self._count(trainer, outputs, list(self._metrics)[dataloader_idx])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count(trainer, outputs, "test")

    def _count(self, trainer: Trainer, outputs: Any, split: str) -> None:
        tasks, metrics = outputs["tasks"], self._metrics[split]
        predictions = most_likely(outputs["logits"], TOP_K if "last_accuracy_top5" in metrics else 1)
        metrics.update(predictions, outputs["targets"], tasks, _last_task(trainer))
        self._task_incremental[split].update(outputs["logits"], outputs["targets"], tasks, _last_task(trainer))
        losses = torch.stack([outputs["losses"], torch.ones_like(outputs["losses"])])
        self._losses[split].index_add_(1, tasks, losses)
        seen = tasks <= _last_task(trainer)
        self._calibration[split].update(outputs["logits"][seen], outputs["targets"][seen])

    # --- reports

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the evaluation found."""
        if trainer.sanity_checking and not self._begins_untrained:
            return
        for split in self._metrics:
            if trainer.sanity_checking:
                self._note_untrained(pl_module, split)
            elif is_fitting(trainer):
                self._log_task(trainer, pl_module, split)
            else:
                self._report_evaluation(trainer, pl_module, split)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracy of each task."""
        self._report_evaluation(trainer, pl_module, "test")

    def _note_untrained(self, pl_module: LightningModule, split: str) -> None:
        counts = self._accuracy_matrix(split)
        summed = {
            name: sum_over_ranks(getattr(counts, f"untrained_{name}")).to("cpu", torch.int32)
            for name in ("correct", "total")
        }
        self._untrained[split] = summed
        self._losses[split].zero_()
        self._calibration[split].reset()
        accuracy = average_accuracy((summed["correct"] / summed["total"])[None, : counts.num_evaluated_tasks])
        pl_module.print(f"Before task 1: {split} average accuracy {accuracy:.3f}")

    def _log_task(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        task = _last_task(trainer)
        self._counts[split] = self._sum_counts(split)
        results, counts = self._computed(split), self._accuracy_matrix(split)
        after = counts.evaluated_after[: len(self._counts[split]["total"])]
        matrix = results.pop("accuracy_matrix")[: len(after), : counts.num_evaluated_tasks]
        loss_sums, loss_counts = sum_over_ranks(self._losses[split])
        losses = loss_sums / loss_counts
        self._losses[split].zero_()
        found = defined(self._calibration[split].compute())
        self._calibration[split].reset()
        evaluations = self._calibrations.setdefault(split, [])
        evaluations[len(self._counts[split]["total"]) - 1 :] = [found]  # once, if an evaluation is repeated
        scalars = {f"{split}/{name}": value for name, value in (defined(results) | found).items()}
        hand_to_trainer(pl_module, scalars)
        for other in evenly_spaced(matrix.shape[1], MOST_CURVES):
            scalars[f"{split}_accuracy_by_task/task_{other + 1}"] = float(matrix[-1, other])
            if losses[other] < LARGEST_LOSS:
                scalars[f"{split}_loss_by_task/task_{other + 1}"] = float(losses[other])
        # a matrix holds all earlier ones: in a fast stream not each of them is worth the time to draw it
        last = task == stream_of(trainer).num_tasks - 1
        draw = self._figures and (
            last or time.monotonic() - self._drawn.get(split, -math.inf) > SECONDS_BETWEEN_FIGURES
        )
        if draw:
            self._drawn[split] = time.monotonic()
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                # tasks are the axis that matters here, not optimizer steps
                for name, value in scalars.items():
                    logger.experiment.add_scalar(name, value, task + 1)
                if draw:
                    title = f"{split} accuracy after task {task + 1}"
                    figure = accuracy_matrix_figure(_array(matrix), title, after)
                    logger.experiment.add_figure(f"{split}/accuracy_matrix", figure, task + 1)
                    figure.clear()  # else its arrays wait for the garbage collector
            else:
                logger.log_metrics({"task": task + 1, **scalars}, trainer.global_step)
        forgetting = "" if results["forgetting"].isnan() else f", forgetting {results['forgetting']:.3f}"
        pl_module.print(
            f"After task {task + 1}: {split} average accuracy {results['average_accuracy']:.3f}{forgetting}"
        )

    def _report_evaluation(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        counts = self._accuracy_matrix(split)
        results = self._computed(split)
        results.pop("accuracy_matrix")
        results |= self._calibration[split].compute()
        hand_to_trainer(pl_module, {f"{split}/{name}": value for name, value in defined(results).items()})
        correct, total = (
            sum_over_ranks(getattr(counts, name)[0, : counts.num_evaluated_tasks]) for name in ("correct", "total")
        )
        overall = float(correct.sum() / total.sum())
        by_task = [f"  task {task + 1}: {100 * value:5.1f} %" for task, value in enumerate((correct / total).tolist())]
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_metrics({f"{split}/accuracy": overall}, trainer.global_step)
        pl_module.print(
            "\n".join(
                [
                    f"Accuracy on the {split} samples of all classes: {100 * overall:.1f} %",
                    *shortened(by_task),
                ]
            )
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write results.json and the figure, and print the table."""
        summaries = {split: self._summary(trainer, split) for split in self._metrics}
        if any(summary is None for summary in summaries.values()):
            if not is_trial(trainer):
                rank_zero_warn(f"No task was evaluated, so there is no {RESULTS}: {what_cut_it_short(trainer)}.")
            return
        if is_trial(trainer):
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        method: Any = pl_module
        after = self._accuracy_matrix("test").evaluated_after[: len(self._counts["test"]["total"])]
        results = {
            **(summaries["test"] or {}),
            **({"evaluated_after": after} if stream_of(trainer).evaluate_every_n_tasks > 1 else {}),
            "num_tasks": stream_of(trainer).num_tasks,
            "seed": global_seed(),
            "seconds": round(self._seconds(), 3),
            "parameters": method.parameter_counts(),
        }
        if method.goes_on:
            measured = [one.accuracies for one in trainer.callbacks if isinstance(one, EarlierTasks)]  # type: ignore[attr-defined]
            none = [None] * len(next(iter(measured[0].values()), [])) if measured else []
            earlier = [rows.get(task - 1, none) for rows in measured for task in after]
            both = with_parent(method.parent.get("accuracy_matrix"), results["accuracy_matrix"], earlier)
            results["parent"] = {"from": method.parent.get("from"), "accuracy_matrix_of_both": both}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CostMonitor):
                results["cost"] = callback.cost(pl_module)
        trained = after[-1]
        if trained < results["num_tasks"]:
            results["tasks_trained"] = trained
            rank_zero_warn(
                f"The run ended after task {trained} of {results['num_tasks']} ({what_cut_it_short(trainer)}); the "
                "results cover these only."
            )
        results |= {split: summary for split, summary in summaries.items() if split != "test"}
        write_at_once(folder / RESULTS, json.dumps(results, indent=2) + "\n")
        if self._figures:
            matrix = np.array(results["accuracy_matrix"])
            save_figure(accuracy_matrix_figure(matrix, "test accuracy", after), folder / "accuracy_matrix.png")
        print(results_table(results), f"\nresults in {folder / RESULTS}", sep="")

    def _summary(self, trainer: Trainer, split: str) -> dict[str, Any] | None:
        if split not in self._counts:
            return None
        values, counts = self._computed(split), self._accuracy_matrix(split)
        by_task = accuracy_by_task(
            self._counts[split], counts.num_evaluated_tasks, stream_of(trainer).class_groups, counts.evaluated_after
        )
        matrix = values.pop("accuracy_matrix")[: len(by_task), : counts.num_evaluated_tasks]
        calibrations = self._calibrations[split]
        by_task = [row | found for row, found in zip(by_task, calibrations, strict=True)]
        of_task = self._counts[split]["correct_of_task"].double() / self._counts[split]["total"]
        summary: dict[str, Any] = {
            "accuracy_matrix": matrix.tolist(), **defined(values), **calibrations[-1], "by_task": by_task,
            "task_incremental_accuracy_matrix": of_task[:, : counts.num_evaluated_tasks].tolist(),
        }  # fmt: skip
        if split in self._untrained:
            untrained = self._untrained[split]
            accuracies = untrained["correct"].double() / untrained["total"]
            summary["untrained_accuracy"] = accuracies[: counts.num_evaluated_tasks].tolist()
        return summary

    def _accuracy_matrix(self, split: str, name: str = "accuracy_matrix") -> AccuracyMatrix:
        metric = getattr(self._metrics[split], name)  # the first of those that share its state; an index copies it
        assert isinstance(metric, AccuracyMatrix)
        return metric

    def _computed(self, split: str) -> dict[str, Tensor]:
        found = self._metrics[split].compute()
        return {**found, "task_incremental_accuracy": self._task_incremental[split].compute()}

    def _sum_counts(self, split: str) -> dict[str, Tensor]:
        matrix = self._accuracy_matrix(split)
        of_task = self._task_incremental[split].correct
        counts = {"correct": matrix.correct, "total": matrix.total, "correct_of_task": of_task}
        if "last_accuracy_top5" in self._metrics[split]:
            counts["correct_top5"] = self._accuracy_matrix(split, "last_accuracy_top5").correct
        total = sum_over_ranks(counts.pop("total"))
        total = total[: int((total.sum(dim=1) > 0).sum())]
        return {
            "total": total.to("cpu", torch.int32),
            **{name: sum_over_ranks(count[: len(total)]).to("cpu", torch.int32) for name, count in counts.items()},
        }

    # --- state

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Counts of the evaluations so far, summed over ranks, a row for each, and of that before the first task; and
        the seconds spent.
        """
        return {
            "counts": self._counts,
            "calibrations": self._calibrations,
            "untrained": self._untrained,
            "before": self._before,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the counts until the fit starts."""
        self._counts, self._seconds_before = state_dict["counts"], state_dict["seconds"]
        self._calibrations = state_dict["calibrations"]
        self._untrained = state_dict["untrained"]


def hand_to_trainer(pl_module: LightningModule, values: dict[str, float]) -> None:
    """Put values of an evaluation, the same on all ranks, where the trainer's callbacks and schedulers look for them;
    loggers have them from here.
    """
    for name, value in values.items():
        pl_module.log(name, value, logger=False, on_step=False, on_epoch=True, add_dataloader_idx=False, batch_size=1)


def _last_task(trainer: Trainer) -> int:
    """The task trained last, -1 before the first; outside a fit the one evaluation counts as the stream's last."""
    if trainer.sanity_checking:
        return -1
    return current_task(trainer) if is_fitting(trainer) else int(stream_of(trainer).num_tasks) - 1


def _array(matrix: Tensor) -> NDArray[np.float64]:
    return matrix.to(torch.float64).cpu().numpy()
