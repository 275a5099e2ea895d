"""Bad checkpoints, and bad files of weights."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from mh_lightning.cli import main
from tests.bad_input.table import DATA, HEAD, MODEL, Place, Row, check, place, table, tensors
from tests.bad_input.test_data import image_config
from tests.data.packed import images_of, write_files

__all__ = ["place"]
GOOD: dict[str, bytes] = {}  # of a run, made once


def good_checkpoint(place: Place) -> bytes:
    """After the first of two tasks."""
    if not GOOD:
        runs = place.folder / "good"
        main(["fit", "--config", str(place.config), "--run_dir", str(runs)])
        (path,) = runs.rglob("task_1.ckpt")
        GOOD["checkpoint"] = path.read_bytes()
    return GOOD["checkpoint"]


def raw(name: str, content: Callable[[Place], bytes], sentence: str, *options: str) -> Row:
    return Row(name, lambda place: ["--ckpt_path", place.write("bad.ckpt", content(place)), *options], sentence)


def checkpoint(name: str, change: Callable[[Any, Place], Any], sentence: str, *options: str) -> Row:
    """A good checkpoint, with something of it changed."""

    def content(place: Place) -> bytes:
        state = torch.load(io.BytesIO(good_checkpoint(place)), weights_only=True)
        replaced, file = change(state, place), io.BytesIO()
        torch.save(state if replaced is None else replaced, file)
        return file.getvalue()

    return raw(name, content, sentence, *options)


def without(key: str) -> Callable[[Any, Place], None]:
    return lambda state, place: state.pop(key) and None


def put(value: Any, *keys: Any) -> Callable[[Any, Place], None]:
    """Something else in a place of the checkpoint."""

    def change(state: Any, place: Place) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


OPTIMIZER_STATE = ("optimizer_states", 0)
METRICS = ("callbacks", "ContinualMetrics")
WEIGHTS = ("state_dict", "head.M")
CHECKPOINTS = (
    raw("half a checkpoint", lambda place: good_checkpoint(place)[:3000], "ckpt_path=.* cannot be read; it is damaged"),
    raw("no bytes", lambda place: b"", "ckpt_path=.* cannot be read"),
    raw("pickle that runs code", lambda place: pickle.dumps(place.bomb), "ckpt_path=.* which is never loaded"),
    raw("safetensors", lambda place: save(tensors()), "ckpt_path=.* cannot be read"),
    checkpoint("entry that runs code", lambda state, place: state.update(architecture=place.bomb), "is never loaded"),
    checkpoint("list", lambda state, place: [1], "is no checkpoint of mh_lightning"),
    checkpoint("no weights", without("state_dict"), "is no checkpoint of mh_lightning"),
    checkpoint("no version", without("pytorch-lightning_version"), "ckpt_path: the checkpoint cannot be restored"),
    checkpoint("no loops", without("loops"), "does not tell where in the stream it was saved"),
    checkpoint("no optimizer", without("optimizer_states"), "holds the state of 0 optimizers|cannot be restored"),
    checkpoint("weights are null", put(None, "state_dict"), "ckpt_path: "),
    checkpoint("weights without names", put({1: 2}, "state_dict"), "state_dict must hold tensors by name"),
    checkpoint("text as weights", put("x", *WEIGHTS), "state_dict must hold tensors by name"),
    checkpoint("weights of another shape", put(torch.ones(1, 5, 16), *WEIGHTS), r"\(1, 5, 16\).*'head.M'"),
    checkpoint("integers as weights", put(Tensor.long, *WEIGHTS), "of integers for 'head.M'"),
    checkpoint("complex weights", put(lambda value: value + 0j, *WEIGHTS), "complex64.* for 'head.M'"),
    checkpoint("sparse weights", put(Tensor.to_sparse, *WEIGHTS), "sparse_coo.* for 'head.M'"),
    checkpoint("NaN weights", put(lambda value: value * torch.nan, *WEIGHTS), "NaN or infinite values; .*checkpoint"),
    checkpoint("callbacks are a list", put([1], "callbacks"), "ckpt_path: the checkpoint cannot be restored"),
    checkpoint("metrics are a number", put(5, *METRICS), "ckpt_path: the checkpoint cannot be restored"),
    checkpoint("counts of another stream", put(torch.ones(1, 1), *METRICS, "counts", "test", "total"),
               r"at most 2\) and each of the 2 tasks"),
    checkpoint("cost is text", put("x", "callbacks", "CostMonitor"), "ckpt_path: the checkpoint cannot be restored"),
    checkpoint("optimizers of none", put([], "optimizer_states"), "holds the state of 0 optimizers, the run has 1"),
    checkpoint("moments of another shape", put(torch.ones(7, 7), *OPTIMIZER_STATE, "state", 0, "exp_avg"),
               "optimizer does not fit the parameters"),
    checkpoint("no parameter groups", put([], *OPTIMIZER_STATE, "param_groups"), "optimizer does not fit"),
    checkpoint("learning rate is text", put("x", *OPTIMIZER_STATE, "param_groups", 0, "lr"), "optimizer does not fit"),
    checkpoint("settings are text", put("x", "optimizer_settings"), "optimizer_settings are damaged"),
    checkpoint("generators are text", put("x", "generators"), "generators are damaged"),
    checkpoint("generators hold nothing", put([{}], "generators"), "generators are damaged"),
    checkpoint("a state of no generator", put(torch.ones(3), "generators", 0, "torch"), "generators are damaged"),
    checkpoint("less than no batches", put(-1, "batches_done"), "batches_done must be .*, got -1"),
    checkpoint("all batches of an epoch", put(2, "batches_done"), "after the last batch of an epoch and before"),
    checkpoint("more batches than there are", put(10**6, "batches_done"), "batches_done must be .*, got 1000000"),
    checkpoint("configuration is no YAML", put("{", "configuration"), "configuration is damaged"),
    checkpoint("configuration is a number", put(5, "configuration"), "configuration is damaged"),
    checkpoint("configuration runs code", put("!!python/object/apply:os.system [id]", "configuration"),
               "configuration is damaged"),
    checkpoint("stream is text", put("x", "TensorFile"), "ckpt_path: the checkpoint cannot be restored"),
    checkpoint("other method", lambda state, place: None, "model.class_path .*FineTuning -> .*ExperienceReplay",
               "--model", "mh_lightning.methods.ExperienceReplay", f"{MODEL}buffer_size", "4"),
    checkpoint("other head", lambda state, place: None, "key_mem_units 4 -> 9", f"{HEAD}key_mem_units", "9"),
    checkpoint("other stream", lambda state, place: None, "increment 2 -> 1", f"{DATA}increment", "1"),
    Row("folder", lambda place: ["--ckpt_path", place.folder], "ckpt_path=.* is no file"),
    Row("nothing", ["--ckpt_path", "/nowhere.ckpt"], "ckpt_path='/nowhere.ckpt' is no file"),
)  # fmt: skip


def model() -> dict[str, Tensor]:
    weights: dict[str, Tensor] = timm.create_model("test_efficientnet").state_dict()
    return weights


def weights(name: str, content: Callable[[dict[str, Tensor], Place], Any], sentence: str, suffix: str = ".pth") -> Row:
    """A file of weights: bytes as they are, and anything else as torch or NumPy save it."""

    def prepare(place: Place) -> list[Any]:
        path, inside = place.folder / f"weights{suffix}", content(model(), place)
        if isinstance(inside, bytes):
            path.write_bytes(inside)
        elif suffix == ".npz":
            np.savez(path, **inside)
        else:
            torch.save(inside, path)
        return with_weights(place, path)

    return Row(name, prepare, sentence)


def with_weights(place: Place, path: Path) -> list[Any]:
    root = place.folder / "images"
    write_files(root, images_of({f"{split}/{kind}": 1 for split in ("train", "test") for kind in ("apple", "pear")}))
    return [*image_config(place, "ImageFolder", root), f"{MODEL}backbone.init_args.checkpoint_path", path]


FIRST = "conv_stem.weight"
HALF = bytes([80, 75, 3, 4]) + bytes(300)
UNREADABLE = "backbone.checkpoint_path=.* is no readable weights file"
WEIGHT_FILES = (
    weights("half a weights file", lambda state, place: HALF, UNREADABLE),
    weights("no weights file", lambda state, place: b"", UNREADABLE),
    weights("weights that run code", lambda state, place: {**state, "a": place.bomb}, UNREADABLE),
    weights("bare pickle that runs code", lambda state, place: pickle.dumps(place.bomb), UNREADABLE),
    weights("array that runs code", lambda state, place: {"a": np.array([place.bomb])}, "Object arrays", ".npz"),
    weights("half an npz file", lambda state, place: HALF, UNREADABLE, ".npz"),
    weights("half a safetensors file", lambda state, place: HALF, UNREADABLE, ".safetensors"),
    weights("empty dict", lambda state, place: {}, "something other than named tensors"),
    weights("list of tensors", lambda state, place: [torch.ones(1)], UNREADABLE),
    weights("other names", lambda state, place: {f"x.{key}": value for key, value in state.items()}, "it lacks"),
    weights("one is missing", lambda state, place: {key: state[key] for key in state if key != FIRST}, f"'{FIRST}'"),
    weights("other shape", lambda state, place: {**state, FIRST: torch.ones(3)}, "does not fit 'test_efficientnet'"),
    weights("integers", lambda state, place: {key: value.long() for key, value in state.items()}, "from integers"),
    weights("complex", lambda state, place: {**state, FIRST: state[FIRST] + 0j}, "dense tensors of real numbers"),
    weights("8 bits", lambda state, place: {**state, FIRST: state[FIRST].to(torch.float8_e4m3fn)}, "real numbers"),
    weights("without data", lambda state, place: {**state, FIRST: state[FIRST].to("meta")}, "dense tensors"),
    weights("NaN", lambda state, place: {**state, FIRST: state[FIRST] * torch.nan}, f"NaN or .*'{FIRST}'"),
    Row("weights in a folder", lambda place: with_weights(place, place.folder), "checkpoint_path=.* is no file"),
)  # fmt: skip


@table(*CHECKPOINTS)
def test_one_sentence_on_checkpoints(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    good_checkpoint(place)
    capsys.readouterr()
    check(row, place, capsys)


@table(*WEIGHT_FILES)
def test_one_sentence_on_weights(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(row, place, capsys)
