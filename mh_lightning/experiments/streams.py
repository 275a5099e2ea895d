"""Which experiments learn the same stream, and may be compared."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mh_lightning.errors import UserError
from mh_lightning.experiments.runs import Experiment
from mh_lightning.option_roles import Role, of_roles

OF_A_STREAM = (Role.CHANGEABLE, Role.STREAM)


@dataclass(frozen=True)
class Stream:
    """Experiments on one stream, in the order of the command line.

    Args:
        title: what their names start with, and the data module.
        experiments: their names.
        baseline: the one that the others are compared with, if any.
    """

    title: str
    experiments: tuple[str, ...]
    baseline: str | None = None


def group_by_stream(experiments: Sequence[Experiment], baseline: str | None = None) -> list[Stream]:
    """Group experiments whose data sections agree, apart from seeds and from how a method goes through the data.

    Args:
        experiments: with different names.
        baseline: name of an experiment, or the end of one name in each stream.

    Raises:
        UserError: if the baseline is none of them, or is not the end of exactly one name in each stream.
    """
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(_stream_of(experiment), []).append(experiment)
    names = [experiment.name for experiment in experiments]
    streams = []
    for group in groups.values():
        members = tuple(experiment.name for experiment in group)
        chosen = None if baseline is None else _baseline_of(members, baseline, baseline in names)
        streams.append(Stream(_title(group), members, chosen))
    return streams


def _stream_of(experiment: Experiment) -> str:
    return json.dumps(of_roles({"data": experiment.configuration["data"]}, *OF_A_STREAM), sort_keys=True)


def _title(group: Sequence[Experiment]) -> str:
    data = str(group[0].configuration["data"]["class_path"]).rpartition(".")[2]
    shared = shared_name([experiment.name for experiment in group])
    return f"{shared} ({data})" if shared else data


def shared_name(names: Sequence[str]) -> str:
    """The words that all names start with, if each goes on after them.

    Example:
        >>> shared_name(["blobs_fine_tuning", "blobs_replay"]), shared_name(["blobs", "blobs_replay"])
        ('blobs', '')
    """
    head = names[0] if len(names) > 1 else ""
    while head and not all(name.startswith((f"{head}_", f"{head}-")) for name in names):
        head = re.sub("[_-]?[^_-]*$", "", head)
    return head


def _baseline_of(names: Sequence[str], baseline: str, is_a_name: bool) -> str | None:
    if baseline in names:
        return baseline
    fitting = [name for name in names if name.endswith(baseline)]
    if len(fitting) == 1:
        return fitting[0]
    if is_a_name and not fitting:
        return None
    found = f"{' and '.join(fitting)} end in it" if fitting else f"none of {', '.join(names)} ends in it"
    raise UserError(
        f"--baseline: {baseline!r} must name an experiment, or be the end of one name in each stream; {found}."
    )
