"""How a data set is cut into the tasks of a stream."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mh_lightning.data.labelled import Labelled
from mh_lightning.data.sample_checks import check_domains, check_scenario
from mh_lightning.data.scenarios import Task, samples_of_tasks, tasks_of_scenario
from mh_lightning.data.splits import first_half
from mh_lightning.errors import UserError


class CutStream(NamedTuple):
    """Tasks, the samples of each split, and which of them belong to each task."""

    tasks: list[Task]
    splits: dict[str, Labelled]
    samples_of_tasks: dict[str, list[NDArray[np.int64]]]


def cut_into_tasks(
    scenario: str,
    groups: Sequence[Sequence[int]],
    splits: dict[str, Labelled],
    class_names: Sequence[str],
    validation_tasks: str = "all",
) -> CutStream:
    """Cut the splits of a data set into tasks.

    Args:
        scenario: see `tasks_of_scenario`.
        groups: classes of each task, see `class_groups`.
        splits: "train", "test" and perhaps "validation".
        class_names: name of each class.
        validation_tasks: "all", or "first_half" to keep validation samples of the first half of the tasks only.

    Raises:
        UserError: if the samples do not suit the scenario, or a task has no sample of a split.

    Example:
        >>> four = Labelled(["a", "b", "c", "d"], np.array([0, 1, 1, 0]))
        >>> cut = cut_into_tasks("CI", [[1], [0]], {"train": four, "test": four}, ["cat", "dog"])
        >>> [samples.tolist() for samples in cut.samples_of_tasks["train"]]
        [[1, 2], [0, 3]]
    """
    num_domains = len(np.unique(splits["train"].domain_of_sample))
    for split, samples in splits.items():
        check_domains(samples.domain_of_sample, num_domains, split)
    check_scenario(scenario, splits["train"])
    tasks = tasks_of_scenario(scenario, groups, num_domains)
    parts = {
        split: samples_of_tasks(samples.labels, samples.domain_of_sample, tasks) for split, samples in splits.items()
    }
    for split, of_tasks in parts.items():
        empty = [task for task, part in zip(tasks, of_tasks, strict=True) if not len(part)]
        if empty:
            raise UserError(
                f"data: no {split} sample of {name_of_task(empty[0], class_names)}; each task needs some in every "
                "split."
            )
    if "validation" in splits and validation_tasks == "first_half":
        held_out = first_half(splits["validation"], parts["validation"])
        splits = {**splits, "validation": held_out}
        parts["validation"] = samples_of_tasks(held_out.labels, held_out.domain_of_sample, tasks)
    return CutStream(tasks, splits, parts)


def name_of_task(task: Task, class_names: Sequence[str]) -> str:
    """The classes and the domain of a task, to be shown.

    Example:
        >>> name_of_task(Task([1, 0], domain=0), ["cat", "dog"])
        'classes dog, cat in domain 1'
    """
    names = f"class{'es' if len(task.classes) > 1 else ''} {', '.join(class_names[label] for label in task.classes)}"
    return names if task.domain is None else f"{names} in domain {task.domain + 1}"
