"""Whatever a configuration says, a run succeeds or ends with one sentence and exit code 2."""

import copy
import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mh_lightning.cli import main, resolved_configuration
from tests.bad_input.table import TINY, tensors

Leaf = tuple[str | int, ...]

# what would rather take all processors or memory, or for ever, than be wrong; or reach out of the test's folder
EXCLUDED = {"num_threads", "num_workers", "num_nodes", "run_dir", "default_root_dir", "detect_anomaly", "deterministic",
            "benchmark", "config", "folder", "devices", "strategy", "barebones"}  # fmt: skip
MOST = {"epochs_per_task": 3, "key_mem_units": 100, "key_size": 100}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**6, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30)]),
    st.floats(),
    st.floats(-2, 2),
    st.text(max_size=6),
    st.sampled_from(
        ["auto", "nan", "1e400", "torch.nn.Linear", "torch.nn.ReLU", "os.system", "a.b.c", "../..", "[", "{"]
    ),
    st.lists(st.integers(-1, 4) | st.text(max_size=2), max_size=4),
    st.dictionaries(st.sampled_from(["class_path", "init_args", "x"]), st.text(max_size=3) | st.none(), max_size=2),
)


def leaves(value: Any, path: Leaf = ()) -> list[Leaf]:
    """The paths of all values that are no dicts."""
    if isinstance(value, dict) and value:
        return [leaf for key, entry in value.items() if key not in EXCLUDED for leaf in leaves(entry, (*path, key))]
    return [path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny run, with all its options."""
    folder = tmp_path_factory.mktemp("fuzzed")
    save_file(tensors(), folder / "tensors.safetensors")
    config = folder / "base.yaml"
    config.write_text(TINY.replace("PATH", str(folder / "tensors.safetensors")))
    return resolved_configuration(["--config", str(config)]) | {"experiment": "fuzzed"}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_success_or_one_sentence(base: dict[str, Any], data: st.DataObject) -> None:
    configuration = copy.deepcopy(base)
    for path in data.draw(st.lists(st.sampled_from(leaves(base)), min_size=1, max_size=2, unique=True), label="where"):
        value = data.draw(VALUES, label="what")
        most = MOST.get(str(path[-1]))
        if most is not None and isinstance(value, int | float) and most < value < 2**62:
            value = most
        place = configuration
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stderr(io.StringIO()) as said,
        redirect_stdout(io.StringIO()),
    ):
        path = Path(folder) / "fuzzed.yaml"
        path.write_text(yaml.safe_dump(configuration, allow_unicode=True), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py"])
            patch.chdir(folder)
            try:
                main(["fit", "--config", str(path), "--run_dir", folder])
            except SystemExit as ended:
                assert ended.code == 2
                lines = said.getvalue().splitlines()
                assert len(lines) == 1 and lines[0].startswith("error: "), said.getvalue()
