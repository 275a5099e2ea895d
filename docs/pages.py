"""Writes the pages of methods, streams and metrics from the code: `python docs/pages.py`."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch

import mh_lightning.data
import mh_lightning.heads
import mh_lightning.methods
from mh_lightning.backbones import Adapters, Backbone, Identity, TimmBackbone
from mh_lightning.callbacks.cost import state_bytes
from mh_lightning.data import StreamDataModule
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.data.scenarios import tasks_of_scenario
from mh_lightning.heads import ClosedFormHead
from mh_lightning.methods import EASE, ClosedForm, ContinualMethod
from mh_lightning.methods.distillation import DistillingMethod
from mh_lightning.methods.prompting import PromptMethod
from mh_lightning.methods.replay import ReplayMethod
from mh_lightning.methods.retraining import RetrainingMethod
from mh_lightning.metrics import CALIBRATION, METRICS, Calibration, TaskIncrementalAccuracy, functional

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs"
FEATURES, CLASSES, SAMPLES = 1280, 100, 500
TRANSFORMER = "vit_tiny_patch16_224"
MADE_BY = "<!-- Made by `python docs/pages.py` from the code; change that. -->"


METHODS = """# Methods

{made_by}

All are classes of `mh_lightning.methods`, and take `backbone`, `head` and the options of `ContinualMethod`;
`python train.py fit --config streams/… --config methods/…` names a configuration. "Needs borders": refuses a stream
that does not tell where tasks begin and end. MB: of the state at the end, with a linear head on a frozen backbone of
{features} features, {classes} classes in ten tasks and, where samples are replayed, {samples} of them as features;
methods that prompt or train adapters have a `{transformer}`.

| method | paper | year | replays | needs borders | MB | configurations |
|---|---|---|---|---|---|---|
{methods}

## Heads in closed form

Heads of `mh_lightning.heads` that are solved from sums, in one pass; the method is `ClosedForm`, which replays nothing
and needs no borders. MB: of the head, with its defaults.

| head | paper | year | MB | configurations |
|---|---|---|---|---|
{heads}

## What each does

A method or a head each.
{sections}
"""
STREAMS = """# Streams

{made_by}

All are classes of `mh_lightning.data`; `python train.py fit --config streams/…` names a configuration. Each takes the
options of `StreamDataModule`: scenario, classes a task, order, batches, validation, blurry borders, class imbalance and
label noise.

| data set | what | configurations |
|---|---|---|
{rows}

## Scenarios

`data.scenario` is {scenarios}

## Blurry borders

`data.blurry_borders` lets training samples come in other tasks than that of their class:
`--data.blurry_borders SiBlurry --data.blurry_borders.minor 0.3`. `data.announces_tasks: false` keeps sharp tasks, and
does not tell them. `data.imbalance_ratio` and `data.label_noise` spoil the training samples of any stream.
{blurry}
"""
METRICS_PAGE = """# Metrics

{made_by}

All are in results.json of a run, in its curves, and in `trainer.callback_metrics`; in Python they are functions of
`mh_lightning.metrics.functional`, and torchmetrics classes by `mh_lightning.metrics.ContinualMetric(name, num_tasks)`.
$A_{{ij}}$ is the accuracy on task j after task i, and t the number of tasks seen.
{metrics}
"""


def classes_of(module: Any, base: type) -> list[type]:
    """What a package offers of a kind, in alphabetical order."""
    found = [getattr(module, name) for name in module.__all__]
    kinds = [one for one in found if inspect.isclass(one) and issubclass(one, base) and not inspect.isabstract(one)]
    return sorted((one for one in kinds if one is not base), key=lambda kind: kind.__name__.lower())


def as_markdown(text: str) -> str:
    """A docstring's prose in Markdown."""
    text = re.sub(r":math:`([^`]*)`", lambda found: "$" + " ".join(found[1].split()) + "$", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"(?<![`\w])(ContinualMethod|FirstTaskAdaptation)(?![`\w])", r"`\1`", text)


def parts_of(kind: type) -> tuple[str, str]:
    """The prose of a docstring, and its source."""
    text = inspect.getdoc(kind) or ""
    prose = re.split(r"\n(?:Args|Attributes|Raises|Example|Source|Returns):", text)[0].strip()
    prose = re.sub(r"\n*See `\w+` for the arguments[^.]*\.", "", prose)
    source = re.search(r"\nSource: (.*?)(?:\n\n|\Z)", text, re.DOTALL)
    return as_markdown(prose), " ".join(source[1].split()) if source else ""


def title_of(source: str) -> str:
    """What it was published as."""
    first = source.split(";")[0]
    return first.split('"')[1] if '"' in first else ",".join(first.split(",")[:2])


def year_of(source: str) -> str:
    """When it was published."""
    years = re.findall(r"\b(?:19|20)\d\d\b", source)
    return years[0] if years else ""


def configurations(folder: str, *names: str) -> list[str]:
    """The configurations that name one of some classes."""
    found = []
    for file in sorted((CONFIGS / folder).glob("*.yaml")):
        text = file.read_text()
        if any(re.search(rf"class_path: (?:[\w.]+\.)?{name}\b", text) for name in names):
            found.append(f"`{folder}/{file.name}`")
    return found


def stream() -> LearntStream:
    """So many classes in ten tasks."""
    tasks = torch.arange(CLASSES).view(10, -1).tolist()
    return LearntStream([str(label) for label in range(CLASSES)], tasks)


def bytes_of(method: ContinualMethod) -> int:
    """Of a method's state, with all that it makes while it learns."""
    method.learnt_stream = stream()
    method.make_parts()
    if isinstance(method, ReplayMethod):
        assert method.replay_buffer is not None
        method.replay_buffer.make_room(torch.Size([FEATURES]))
    if isinstance(method, DistillingMethod):
        method.teacher = method.make_module("teacher")
    return state_bytes(method)


def megabytes(number: int) -> str:
    """With three digits.

    Example:
        >>> megabytes(512_400), megabytes(10_000_000)
        ('0.512', '10.0')
    """
    value = number / 1e6
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def method_row(kind: type[ContinualMethod]) -> str:
    """Of the table of methods."""
    _, source = parts_of(kind)
    options: dict[str, Any] = {"buffer_size": SAMPLES} if issubclass(kind, ReplayMethod) else {}
    backbone: Backbone = Identity(FEATURES)
    if issubclass(kind, PromptMethod | EASE):
        backbone = TimmBackbone(TRANSFORMER, peft=Adapters() if kind is EASE else None)
    size = megabytes(bytes_of(kind(backbone, torch.nn.Linear, **options)))
    if issubclass(kind, RetrainingMethod) and not issubclass(kind, ReplayMethod):
        size += ", and all samples"
    files = ", ".join(configurations("methods", kind.__name__))
    replays, borders = issubclass(kind, ReplayMethod), kind.needs_task_borders
    cells = [f"[{kind.__name__}](#{kind.__name__.lower()})", title_of(source), year_of(source),
             yes(replays), yes(borders), size, files]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def head_row(kind: type[ClosedFormHead]) -> str:
    """Of the table of heads in closed form."""
    _, source = parts_of(kind)
    head = kind(FEATURES, CLASSES)
    keeps = getattr(head, "state_bytes", None)
    size = megabytes(bytes_of(ClosedForm(Identity(FEATURES), kind)) if keeps is None else keeps)
    if "Joint" in kind.__name__:
        size = "all samples"
    files = ", ".join(configurations("methods", kind.__name__))
    return (
        f"| [{kind.__name__}](#{kind.__name__.lower()}) | {title_of(source)} | {year_of(source)} | {size} | {files} |"
    )


def yes(value: bool) -> str:
    """For a cell."""
    return "yes" if value else "no"


def sections(kinds: list[type]) -> list[str]:
    """A section each: what it does, and its source."""
    lines = []
    for kind in kinds:
        prose, source = parts_of(kind)
        lines += ["", f"### {kind.__name__}", "", prose]
        if source:
            lines += ["", f"Source: {as_markdown(source)}"]
    return lines


def methods_page() -> str:
    """docs/methods.md."""
    methods = [one for one in classes_of(mh_lightning.methods, ContinualMethod) if one is not ClosedForm]
    heads = classes_of(mh_lightning.heads, ClosedFormHead)
    return METHODS.format(
        made_by=MADE_BY,
        features=f"{FEATURES:,}",
        classes=CLASSES,
        samples=SAMPLES,
        transformer=TRANSFORMER,
        methods="\n".join(map(method_row, methods)),
        heads="\n".join(map(head_row, heads)),
        sections="\n".join(sections([*methods, ClosedForm, *heads])),
    )


def streams_page() -> str:
    """docs/streams.md."""
    rows = []
    for kind in classes_of(mh_lightning.data, StreamDataModule):
        first = " ".join(parts_of(kind)[0].split("\n\n")[0].split())
        rows.append(f"| {kind.__name__} | {first} | {', '.join(configurations('streams', kind.__name__))} |")
    blurry = [getattr(mh_lightning.data, name) for name in ("IBlurry", "SiBlurry", "GaussianSchedule")]
    scenarios = re.search(r"scenario: (.*?)\n +groups:", inspect.getdoc(tasks_of_scenario) or "", re.DOTALL)
    assert scenarios is not None
    return STREAMS.format(
        made_by=MADE_BY,
        rows="\n".join(rows),
        scenarios=" ".join(scenarios[1].split()),
        blurry="\n".join(sections(blurry)),
    )


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = []
    for name in METRICS:
        text = inspect.getdoc(getattr(functional, name.removesuffix("_clipped"))) or ""
        prose = as_markdown(re.split(r"\n(?:Args|Raises|Example|Returns):", text)[0].strip())
        lines += ["", f"## {name}", "", "The same, with negative values as 0." if name.endswith("_clipped") else prose]
    for name, kind in (
        ("task_incremental_accuracy", TaskIncrementalAccuracy),
        (" and ".join(CALIBRATION), Calibration),
    ):
        prose, source = parts_of(kind)
        lines += ["", f"## {name}", "", prose, *(["", f"Source: {source}"] if source else [])]
    return METRICS_PAGE.format(made_by=MADE_BY, metrics="\n".join(lines))


PAGES = {"methods.md": methods_page, "streams.md": streams_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(DOCS / name)
