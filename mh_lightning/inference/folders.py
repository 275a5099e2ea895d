"""A trained model on folders of image files: predictions in a table, and accuracy where folders are classes."""

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mh_lightning.data.labelled import stacked
from mh_lightning.errors import UserError, write_at_once, writing
from mh_lightning.inference.images import as_input, image_files
from mh_lightning.inference.model import Model
from mh_lightning.metrics import Calibration

SHOWN = 5  # classes of each file


class Answers(NamedTuple):
    """What a model says of the files that it could read.

    Attributes:
        files: relative to the folder.
        probabilities: (files, C).
        features: (files, n).
        unreadable: why, for each file that is not among them.
    """

    files: list[Path]
    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    unreadable: list[str]


def answers_of_folder(
    model: Model, folder: Path, batch_size: int, quiet: bool = False, only: str | None = None
) -> Answers:
    """Ask a model about all image files below a folder.

    Args:
        model: that is asked.
        folder: of images, at any depth.
        batch_size: of images that pass through the model at once.
        quiet: without a progress bar.
        only: name of the one file to ask about.

    Raises:
        UserError: if it holds no image files.
    """
    files = [path.relative_to(folder) for path in image_files(folder)] if only is None else [Path(only)]
    read: list[Path] = []
    unreadable: list[str] = []
    features = [np.zeros((0, model.method.backbone.num_features), np.float32)]
    probabilities = [np.zeros((0, len(model.class_names)), np.float32)]
    with tqdm(total=len(files), unit="image", disable=quiet) as progress:
        for part, inputs in _in_batches(model, folder, files, batch_size):
            good = [place for place, one in enumerate(inputs) if isinstance(one, Tensor)]
            unreadable += [str(one) for one in inputs if not isinstance(one, Tensor)]
            read += [part[place] for place in good]
            for found, said in model.batches(stacked([inputs[place] for place in good])) if good else ():  # type: ignore[misc]
                features.append(found)
                probabilities.append(said)
            progress.update(len(part))
    return Answers(read, np.concatenate(probabilities), np.concatenate(features), unreadable)


def _in_batches(
    model: Model, folder: Path, files: Sequence[Path], batch_size: int
) -> Iterator[tuple[Sequence[Path], list[Tensor | UserError]]]:
    def read(file: Path) -> Tensor | UserError:
        if not str(file).isprintable():  # which no table could hold
            return UserError(f"images: {str(file)!r} holds a character that no table can hold; rename it.")
        try:
            return as_input(folder / file, model.method.backbone, model.learnt)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            yield part, list(pool.map(read, part))


def write_table(
    answers: Answers, class_names: Sequence[str], path: Path, with_features: bool, true: Sequence[str] = ()
) -> None:
    """Write a CSV file: a row a file, with its most probable classes and their probabilities, the best first.

    Args:
        answers: of a model.
        class_names: of the probabilities' columns.
        path: of the table.
        with_features: more columns, of the backbone's features.
        true: class of each file, where it is known.
    """
    shown = min(SHOWN, len(class_names))
    ranks = ["", *(f"_{rank}" for rank in range(2, shown + 1))]
    heads = [f"{name}{rank}" for rank in ranks for name in ("class", "probability")]
    numbers = [f"feature_{place}" for place in range(answers.features.shape[1])] if with_features else []
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", *(["true_class"] if true else []), *heads, *numbers])
    best = np.argsort(-answers.probabilities, axis=1, kind="stable")[:, :shown]
    for row, file in enumerate(answers.files):
        said = [text for one in best[row] for text in (class_names[one], f"{answers.probabilities[row, one]:.6f}")]
        values = [f"{value:.7g}" for value in answers.features[row]] if with_features else []
        writer.writerow([file.as_posix(), *([true[row]] if true else []), *said, *values])
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(path, text.getvalue())


def true_classes(files: Sequence[Path], class_names: Sequence[str]) -> list[str]:
    """The classes of files in folders that have their names.

    Raises:
        UserError: if a file lies in no such folder, or the model knows no such class.
    """
    for file in files:
        if len(file.parts) < 2:
            raise UserError(f"images: {str(file)!r} lies in no folder of its class; to test, give folder/<class>/… .")
    unknown = sorted({file.parts[0] for file in files} - {*class_names})
    if unknown:
        raise UserError(
            f"images: the folders {', '.join(map(repr, unknown[:3]))} are no classes of the model, which knows "
            f"{', '.join(map(repr, class_names[:10]))}{' …' if len(class_names) > 10 else ''}."
        )
    return [file.parts[0] for file in files]


def report(answers: Answers, true: Sequence[str], class_names: Sequence[str]) -> dict[str, float]:
    """Accuracy over all files and the mean of that of classes, expected calibration error, negative log-likelihood.

    Raises:
        UserError: if no file could be read.
    """
    if not true:
        raise UserError("images: no image could be read.")
    targets = torch.tensor([class_names.index(name) for name in true])
    probabilities = torch.from_numpy(answers.probabilities)
    right = (probabilities.argmax(dim=1) == targets).double()
    of_class = [float(right[targets == label].mean()) for label in torch.unique(targets)]
    calibration = Calibration()
    calibration.update(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), targets)
    calibrated = {name: float(value) for name, value in calibration.compute().items()}
    return {"accuracy": float(right.mean()), "mean_class_accuracy": float(np.mean(of_class)), **calibrated}
