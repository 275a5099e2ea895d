"""A trained model from its run folder, a checkpoint or a file that holds all of it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mh_lightning.backbones import as_backbone
from mh_lightning.callbacks.reports import with_parent
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.errors import UNREADABLE, UserError, reason_of
from mh_lightning.inference.model import Model
from mh_lightning.methods import ContinualMethod
from mh_lightning.methods.backbone_weights import PREFIX
from mh_lightning.methods.base import Head
from mh_lightning.methods.checkpoint_checks import check_state
from mh_lightning.methods.description import built
from mh_lightning.run_folders import CHECKPOINTS, check_checkpoint, newest_whole_checkpoint, version_folders

MOST_FEATURES = 10**7
SOURCES = ("pretrained", "checkpoint_path", "map_by_order")


def load(
    path: str | Path,
    *,
    backbone: nn.Module | None = None,
    head: Head | None = None,
    trust: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> Model:
    """A trained model, without trainer and data.

    What was given as objects in Python and has no plain description (a module of one's own, a lambda) must be given
    again. Files are read without running any code in them, and of the classes that they name, those of mh_lightning and
    torch.nn are made unasked.

    Args:
        path: a run folder, whose newest checkpoint is taken, an experiment's folder, whose newest run is, a checkpoint,
            or a file of `Model.save`.
        backbone: in place of the one that is described.
        head: the same, as it was given to the method.
        trust: more packages whose classes the file may name.
        device: of the model.

    Raises:
        UserError: if there is no such file, it is damaged, or it needs what is not given.
    """
    file = checkpoint_of(Path(path))
    checkpoint = check_checkpoint(file, option="from")
    given = {name: value for name, value in (("backbone", backbone), ("head", head)) if value is not None}
    with damage_told("from"):
        method = method_of(checkpoint, given, trust)
        method.parent = parent_of(file, checkpoint)
        notes = dict(checkpoint.get("notes", {}))
    model = Model(method.to(device).eval())
    model.notes = notes
    return model


@contextmanager
def damage_told(option: str) -> Iterator[None]:
    """One sentence where the content of a file is not what it should be.

    Raises:
        UserError: in place of what else is raised.
    """
    try:
        yield
    except UserError:
        raise
    except (*UNREADABLE, MemoryError, AssertionError) as error:
        raise UserError(f"{option}: the checkpoint is damaged ({type(error).__name__}: {reason_of(error)}).") from error


def go_on(method: ContinualMethod, path: str | Path) -> None:
    """Fill a method, whose next fit goes on with what a run has learnt.

    Args:
        method: that was made as that of the run.
        path: as in `load`.

    Raises:
        UserError: if it is another one.
    """
    file = checkpoint_of(Path(path))
    checkpoint = check_checkpoint(file, option="continue_from")
    with damage_told("continue_from"):
        fill(method, checkpoint, option="continue_from")
        method.parent = parent_of(file, checkpoint)


def parent_of(file: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint lies, and the accuracies on test data until it was saved."""
    state = checkpoint.get("callbacks", {}).get("ContinualMetrics", {})
    counts = state.get("counts", {}).get("test")
    if counts is None:
        return {"from": str(file)}
    matrix = (counts["correct"].double() / counts["total"]).tolist()
    measured = checkpoint["callbacks"].get("EarlierTasks", {}).get("accuracies", {})
    earlier = [measured[task] for task in sorted(measured)] if len(measured) == len(matrix) else []
    return {"from": str(file), "accuracy_matrix": with_parent(state.get("before"), matrix, earlier)}


def checkpoint_of(path: Path) -> Path:
    """The file that a path means.

    Raises:
        UserError: if there is none.
    """
    if not path.exists():
        raise UserError(f"from={str(path)!r}: there is no such file or folder; give a run folder or a checkpoint.")
    if not path.is_dir():
        return path
    runs = [path, *version_folders(path)]
    run = next((folder for folder in runs if (folder / CHECKPOINTS).is_dir()), path)
    found = newest_whole_checkpoint(run, option=f"from={str(path)!r}")
    if found is None:
        raise UserError(
            f"from={str(path)!r} holds no checkpoints; give a run folder such as runs/NAME/version_0, of a fit with "
            "checkpoints, or a file."
        )
    return found


def method_of(checkpoint: dict[str, Any], given: dict[str, Any], trust: Collection[str] = ()) -> ContinualMethod:
    """The method of a checkpoint, with its state.

    Raises:
        UserError: if it cannot be made.
    """
    state = checkpoint["state_dict"]
    tree = checkpoint["model"]
    if any(name.startswith(PREFIX) for name in state):
        tree = _without_sources(tree)
    if "backbone" in given:
        given["backbone"] = as_backbone(given["backbone"])
    missing: list[str] = []
    method = built(tree, given, trust, missing=missing)
    if not isinstance(method, ContinualMethod):
        raise UserError(f"from: the checkpoint describes a {type(method).__name__}, which is no method.")
    fill(method, checkpoint)
    method.left_behind += missing
    return method


def fill(method: ContinualMethod, checkpoint: dict[str, Any], option: str = "from") -> None:
    """Give a method the state of a checkpoint, outside of a trainer.

    Raises:
        UserError: if the checkpoint is damaged, or of another method.
    """
    learnt, state = LearntStream.from_plain(checkpoint["stream"]), checkpoint["state_dict"]
    if type(checkpoint["num_features"]) is not int or not 0 < checkpoint["num_features"] <= MOST_FEATURES:
        raise UserError(f"{option}: the checkpoint's num_features is {checkpoint['num_features']!r}; it is damaged.")
    own, saved = method.backbone.settings(), checkpoint.get("backbone_settings", {})
    for name in sorted(own.keys() & saved.keys()):
        if own[name] != saved[name]:
            raise UserError(
                f"{option}: the model was trained with a backbone of {name}={saved[name]!r}, and this one has "
                f"{own[name]!r}; give the same."
            )
    method.backbone.num_features = checkpoint["num_features"]
    method.learnt_stream = learnt
    method.make_parts()
    method.note_modules()
    if any(value.dtype == torch.float64 for name, value in state.items() if name in dict(method.named_parameters())):
        method.double()  # a run of precision 64-true
    learnt_alone = {name for name in state if not _answers(method, name)}
    method.left_behind = sorted({name.partition(".")[0] for name in learnt_alone})
    checkpoint = {**checkpoint, "state_dict": {name: state[name] for name in state if name not in learnt_alone}}
    method.complete(checkpoint)
    check_state(checkpoint, method.architecture(), learnt.num_classes, method.state_dict(), option=option)
    method.load_state_dict(checkpoint["state_dict"])


def _answers(method: ContinualMethod, name: str) -> bool:
    """Whether a part of the state belongs to what answers, and not to what a method learns with, as a replay buffer."""
    child, dot, _ = name.partition(".")
    makes_modules = type(method).make_module is not ContinualMethod.make_module
    return not dot or makes_modules or method._modules.get(child) is not None


def _without_sources(tree: Any) -> Any:
    """A description whose backbone takes its weights from nowhere else than the checkpoint."""
    if not isinstance(tree, dict) or not isinstance(tree.get("init_args"), dict):
        return tree
    backbone = tree["init_args"].get("backbone")
    if not isinstance(backbone, dict) or not isinstance(backbone.get("init_args"), dict):
        return tree
    arguments = {name: value for name, value in backbone["init_args"].items() if name not in SOURCES}
    return {**tree, "init_args": {**tree["init_args"], "backbone": {**backbone, "init_args": arguments}}}
