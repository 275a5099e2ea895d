"""A trained model from its run folder, a checkpoint or a file that holds all of it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mh_lightning.backbones import as_backbone
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.errors import UserError
from mh_lightning.inference.model import Model
from mh_lightning.methods import ContinualMethod
from mh_lightning.methods.backbone_weights import PREFIX
from mh_lightning.methods.base import Head
from mh_lightning.methods.checkpoint_checks import check_state
from mh_lightning.methods.description import built
from mh_lightning.run_folders import CHECKPOINTS, check_checkpoint, newest_whole_checkpoint, version_folders

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
    checkpoint = check_checkpoint(checkpoint_of(Path(path)), option="from")
    given = {name: value for name, value in (("backbone", backbone), ("head", head)) if value is not None}
    method = method_of(checkpoint, given, trust)
    return Model(method.to(device).eval())


def checkpoint_of(path: Path) -> Path:
    """The file that a path means.

    Raises:
        UserError: if there is none.
    """
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
    learnt = LearntStream.from_plain(checkpoint["stream"])
    state = checkpoint["state_dict"]
    tree = checkpoint["model"]
    if any(name.startswith(PREFIX) for name in state):
        tree = _without_sources(tree)
    if "backbone" in given:
        given["backbone"] = as_backbone(given["backbone"])
    method = built(tree, given, trust)
    if not isinstance(method, ContinualMethod):
        raise UserError(f"from: the checkpoint describes a {type(method).__name__}, which is no method.")
    if not isinstance(checkpoint["num_features"], int):
        raise UserError(f"from: the checkpoint's num_features is {checkpoint['num_features']!r}; it is damaged.")
    method.backbone.num_features = checkpoint["num_features"]
    method.learnt_stream = learnt
    method.make_parts()
    learnt_alone = {name for name in state if not _answers(method, name)}
    checkpoint = {**checkpoint, "state_dict": {name: state[name] for name in state if name not in learnt_alone}}
    method.complete(checkpoint)
    check_state(checkpoint, method.architecture(), learnt.num_classes, method.state_dict(), option="from")
    method.load_state_dict(checkpoint["state_dict"])
    return method


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
