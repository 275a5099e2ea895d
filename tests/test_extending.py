"""What docs/extending.md shows: a method, a head, a backbone, a data set, a metric and a callback of one's own."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

import mh_lightning
import mh_lightning.cli
from mh_lightning.callbacks import ContinualMetrics
from mh_lightning.errors import UserError
from mh_lightning.methods import FineTuning
from tests.conftest import results_of, weights_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "extending"
CONFIG = EXAMPLES / "all_of_it.yaml"
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--pictures", "false")
Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_each_part_is_short_and_shown() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    parts = sorted(EXAMPLES.glob("*.py"))
    assert len(parts) == 6
    for part in parts:
        source = part.read_text()
        assert len(source.splitlines()) <= 30, part
        assert f"```python\n{source}```" in text, f"docs/extending.md shows {part.name} as it is"
    assert f"```yaml\n{CONFIG.read_text()}```" in text
    assert set(re.findall(r"examples/extending/(\w+\.\w+)", text)) >= {part.name for part in parts}


def test_all_of_it_by_command_resumes_and_predicts(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run("fit", CONFIG, *QUIET)
    assert results_of(whole)["worst_task"] == min(results_of(whole)["accuracy_matrix"][-1])
    assert "head_norm/0 degrees" in (whole / "metrics.csv").read_text()
    state = weights_of(whole)
    assert any(name.startswith("teacher.backbone.") for name in state) and "teacher.head.weight" in state
    for stop in (9, 24, 45):  # in the first task, before there is a teacher, and in later ones
        name = ("--experiment", f"stopped_{stop}")
        with pytest.warns(UserWarning, match=r"No task was evaluated|ended after task"):
            run("fit", CONFIG, *QUIET, *name, "--trainer.max_steps", str(stop))
        mh_lightning.cli.main(["fit", "--config", str(CONFIG), *QUIET, *name, "--ckpt_path", "last",
                               "--run_dir", str(whole.parents[1])])  # fmt: skip
        resumed = whole.parents[1] / name[1] / "version_0"
        assert results_of(resumed) == results_of(whole)
        again = weights_of(resumed)
        assert again.keys() == state.keys() and all(again[key].equal(value) for key, value in state.items())
    capsys.readouterr()
    run("test", CONFIG, *QUIET, "--ckpt_path", str(whole / "checkpoints" / "last.ckpt"))
    accuracy = 100 * results_of(whole)["last_accuracy"]
    assert f"Accuracy on the test samples of all classes: {accuracy:.1f} %" in capsys.readouterr().out
    predicted = run("predict", CONFIG, *QUIET, "--ckpt_path", str(whole / "checkpoints" / "task_1.ckpt"))
    assert len((predicted / "predictions.csv").read_text().splitlines()) == 121


def test_all_of_it_in_python(tmp_path: Path, run: Run) -> None:
    from cosine_head import CosineHead
    from head_norms import HeadNorms
    from lwf import LwF
    from small_backbone import SmallBackbone
    from stripes import Stripes
    from worst_task import worst_task

    seed_everything(0)
    method = LwF(SmallBackbone(), CosineHead, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.003))
    callbacks = [HeadNorms(), ContinualMetrics(figures=False, extra={"worst_task": worst_task})]
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "pictures": False}
    stream = Stripes(increment=2, epochs_per_task=5, batch_size=10)
    results = mh_lightning.fit(method, stream, run_dir=tmp_path, callbacks=callbacks, **options)
    by_command = run("fit", CONFIG, *QUIET)
    assert results_of(results.folder) == results_of(by_command)
    without = mh_lightning.fit(
        FineTuning(SmallBackbone(), CosineHead), Stripes(increment=2), run_dir=tmp_path, experiment="other", **options
    )
    assert not any(name.startswith("teacher") for name in weights_of(without.folder))
    with pytest.raises(UserError, match=r"holds a module 'teacher', and FineTuning.make_module makes none"):
        mh_lightning.Trainer(run_dir=tmp_path, **options).test(
            FineTuning(SmallBackbone(), CosineHead), stream, ckpt_path=results.folder / "checkpoints" / "last.ckpt"
        )


def test_buffers_that_are_born_later_come_back(tmp_path: Path) -> None:
    from small_backbone import SmallBackbone
    from stripes import Stripes

    class WithImportance(FineTuning):
        """A buffer is born with the first task, and grows with each."""

        def on_task_end(self, task: int) -> None:
            earlier = getattr(self, "importance", torch.zeros(0))
            self.register_buffer("importance", torch.cat([earlier, torch.full((2,), task + 1.0)]))

    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "pictures": False}
    stream = Stripes(increment=2)
    made = WithImportance(SmallBackbone(), torch.nn.Linear)
    folder = mh_lightning.fit(made, stream, run_dir=tmp_path, **options).folder
    assert weights_of(folder)["importance"].tolist() == [1, 1, 2, 2, 3, 3]
    again = WithImportance(SmallBackbone(), torch.nn.Linear)
    trainer = mh_lightning.Trainer(run_dir=tmp_path, **options)
    trainer.test(again, stream, ckpt_path=folder / "checkpoints" / "task_2.ckpt")
    assert again.importance.tolist() == [1, 1, 2, 2]
    resumed = WithImportance(SmallBackbone(), torch.nn.Linear)
    mh_lightning.fit(resumed, stream, run_dir=tmp_path, ckpt_path=folder / "checkpoints" / "task_1.ckpt", **options)
    assert resumed.importance.tolist() == [1, 1, 2, 2, 3, 3]


def teardown_module() -> None:
    for part in EXAMPLES.glob("*.py"):
        sys.modules.pop(part.stem, None)
