"""Which files are the images of a class: one rule for names in every folder."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from mh_lightning.data.labelled import Labelled
from mh_lightning.errors import UserError, reason_of

SPLITS = ("train", "test")
LAYOUT = "root/train/<class>/ and root/test/<class>/"

# paths that are no samples, by why
LeftOut = defaultdict[str, list[str]]
HIDDEN = "hidden"
NO_IMAGE = "without the suffix of an image"
LOOP = "linking back to a folder above"
TWICE = "linking to a folder that is counted already"
LOOSE = "in no class folder"
BESIDE = f"beside {' and '.join(SPLITS)}"


def class_names_of_splits(root: Path, layout: str = LAYOUT) -> list[str]:
    """The names of the class folders, which are the same in ``root/train`` and ``root/test``, in alphabetical order.

    Args:
        root: the folder above.
        layout: what belongs where, to be told if there is none.

    Raises:
        UserError: if a folder is missing, or a class is in one of them only.
    """
    train, test = (class_names_in(root / split, layout) for split in SPLITS)
    if train != test:
        differ = min(set(train) ^ set(test))
        raise UserError(
            f"data.root={str(root)!r}: train and test must hold the same classes; {differ!r} is in "
            f"{'train' if differ in train else 'test'} only."
        )
    return train


def class_names_in(folder: Path, layout: str) -> list[str]:
    """The names of the folders in `folder`, hidden ones left out, in alphabetical order.

    Args:
        folder: of a folder for each class.
        layout: what belongs where, to be told if there is none.

    Raises:
        UserError: if there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"data.root: the folder {str(folder)!r} does not exist; images belong into {layout}.")
    names = sorted(entry.name for entry in _entries(folder) if _is_folder(entry) and not is_hidden(entry.name))
    if not names:
        raise UserError(f"data.root: {str(folder)!r} holds no class folder; images belong into {layout}.")
    return names


def list_images(folders: Sequence[Path], class_names: Sequence[str]) -> list[Labelled]:
    """The paths of the images in ``folder/<class>``, however deep, for each folder, class after class in alphabetical
    order. Links are followed; a folder that several ways lead to is counted once, a file as often as it is linked to.
    What is left out is counted and told: files and folders that are hidden, files without the suffix of an image, links
    to a folder that they are in, or that is counted already, and folders beside several `folders`.

    Raises:
        UserError: names a class without images, or two classes that links give the same folder.
    """
    left_out: LeftOut = defaultdict(list)
    parts = [_images_of_classes(folder, class_names, left_out) for folder in folders]
    if len(folders) > 1:
        beside = [entry for entry in _entries(folders[0].parent) if _is_folder(entry) and not is_hidden(entry.name)]
        names = {folder.name for folder in folders}
        left_out[BESIDE] += [entry.path for entry in beside if entry.name not in names]
    counted = [f"{len(paths)} {why} (such as {paths[0]!r})" for why, paths in left_out.items() if paths]
    if counted:
        rank_zero_info(f"data.root: left out are {', '.join(counted)}.")
    return parts


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a data set's, such as ``.ipynb_checkpoints`` or the ``._x.png`` of macOS."""
    return name.startswith(".")


def _images_of_classes(folder: Path, class_names: Sequence[str], left_out: LeftOut) -> Labelled:
    for entry in _entries(folder):
        if is_hidden(entry.name):
            left_out[HIDDEN].append(entry.path)
        elif not _is_folder(entry):
            left_out[LOOSE if _is_image(entry.name) else NO_IMAGE].append(entry.path)
    paths: list[str] = []
    labels: list[int] = []
    seen: dict[Path, tuple[int, Path]] = {}
    for label, name in enumerate(class_names):
        real = (folder / name).resolve()
        _first_of_class(folder / name, real, label, seen)
        images = sorted(_images_below(folder / name, (folder.resolve(), real), label, seen, left_out))
        if not images:
            raise UserError(
                f"data.root: the class folder {str(folder / name)!r} holds no image "
                f"({', '.join(IMG_EXTENSIONS)}); fill or remove it."
            )
        paths += images
        labels += [label] * len(images)
    return Labelled(paths, np.array(labels))


def _images_below(
    folder: Path, real_folders: tuple[Path, ...], label: int, seen: dict[Path, tuple[int, Path]], left_out: LeftOut
) -> Iterator[str]:
    """Images in a folder and in those below, which is in `real_folders`, by the way that led there."""
    for entry in sorted(_entries(folder), key=os.DirEntry.is_symlink):  # what is no link is rather counted
        if is_hidden(entry.name):
            left_out[HIDDEN].append(entry.path)
        elif _is_folder(entry):
            real = Path(entry.path).resolve()
            if any(outer.is_relative_to(real) for outer in real_folders):
                left_out[LOOP].append(entry.path)
            elif not _first_of_class(Path(entry.path), real, label, seen):
                left_out[TWICE].append(entry.path)
            else:
                yield from _images_below(Path(entry.path), (*real_folders, real), label, seen, left_out)
        elif _is_image(entry.name):
            yield entry.path
        else:
            left_out[NO_IMAGE].append(entry.path)


def _first_of_class(folder: Path, real: Path, label: int, seen: dict[Path, tuple[int, Path]]) -> bool:
    """Whether no other way has led to a folder before.

    Raises:
        UserError: if one has, from another class.
    """
    first_label, first = seen.setdefault(real, (label, folder))
    if first_label != label:
        raise UserError(
            f"data.root: {str(first)!r} and {str(folder)!r} lead to one folder, whose images would be of two classes; "
            "remove one of them."
        )
    return first == folder


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # entry.is_dir() raises on a link to itself
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"data.root: the folder {str(folder)!r} cannot be read ({error.strerror or reason_of(error)}); mend its "
            "permissions or remove it."
        ) from error
