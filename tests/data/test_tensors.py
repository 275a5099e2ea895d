"""Streams of tensors, from Python and from files."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mh_lightning.backbones import Backbone, TimmBackbone
from mh_lightning.data import StreamDataModule, TensorFile, Tensors
from tests.data.refusal import refused_stream

Entries = dict[str, Tensor]


def entries(**changes: Tensor) -> Entries:
    """Four classes of three features, 20 training and 8 test samples."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x_train": torch.randn(20, 3, generator=generator),
        "y_train": torch.arange(20) % 4,
        "x_test": torch.randn(8, 3, generator=generator),
        "y_test": torch.arange(8) % 4,
    } | changes


def save_npz(values: Entries, path: Path) -> None:
    np.savez(path, **{name: value.numpy() for name, value in values.items()})


def save_compressed(values: Entries, path: Path) -> None:
    np.savez_compressed(path, **{name: value.numpy() for name, value in values.items()})


def save_legacy(values: Entries, path: Path) -> None:
    torch.save(values, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, tuple[str, Callable[[Entries, Path], None]]] = {
    "safetensors": ("data.safetensors", safetensors.torch.save_file),
    "npz": ("data.npz", save_npz),
    "compressed npz": ("data.npz", save_compressed),
    "pt": ("data.pt", torch.save),
    "legacy pt": ("data.pt", save_legacy),
}


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=FORMATS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Entries], Path]:
    """Writes entries into a file of each format."""
    name, save = FORMATS[request.param]

    def write(values: Entries) -> Path:
        save(values, tmp_path / name)
        return tmp_path / name

    return write


def batch(stream: StreamDataModule, backbone: Backbone | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All test samples."""
    stream.setup("fit")
    module = SimpleNamespace(backbone=backbone)
    stream.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, current_epoch=0)
    return next(iter(stream.test_dataloader()[0]))


def test_file(saved: Callable[[Entries], Path]) -> None:
    values = entries()
    stream = TensorFile(str(saved(values)), increment=2)
    x, targets, tasks = batch(stream)
    assert torch.equal(x, values["x_test"]) and torch.equal(targets, values["y_test"])
    assert torch.equal(tasks, values["y_test"] // 2)
    assert stream.class_names == ["0", "1", "2", "3"]
    assert [stream.num_samples("train", task) for task in (0, 1)] == [10, 10]
    loaded = stream.load().train
    assert torch.equal(loaded.inputs, values["x_train"]) and loaded.labels.tolist() == values["y_train"].tolist()


def full_entries(**changes: Tensor) -> Entries:
    """The same with validation samples, and two domains."""
    generator = torch.Generator().manual_seed(1)
    values = {"x_validation": torch.randn(12, 3, generator=generator), "y_validation": torch.arange(12) % 4}
    for split, samples in (("train", 20), ("test", 8), ("validation", 12)):
        values[f"domain_{split}"] = torch.arange(samples) // 4 % 2
    return entries(**values) | changes


def test_validation_samples_and_domains(saved: Callable[[Entries], Path]) -> None:
    values = full_entries()
    for stream in (TensorFile(str(saved(values)), scenario="CDI"), Tensors(**values, scenario="CDI")):
        stream.setup("fit")
        assert [tuple(task) for task in stream.tasks] == [([label], domain) for domain in (0, 1) for label in range(4)]
        splits = stream.load()
        for split, part in (("train", splits.train), ("test", splits.test), ("validation", splits.validation)):
            assert part is not None and torch.equal(part.inputs, values[f"x_{split}"])
            assert part.labels.tolist() == values[f"y_{split}"].tolist()
            assert part.domains is not None and part.domains.tolist() == values[f"domain_{split}"].tolist()
        assert [stream.num_samples("train", task) for task in range(8)] == [3] * 4 + [2] * 4
        assert [stream.num_samples("validation", task) for task in range(8)] == [2] * 4 + [1] * 4


@pytest.mark.parametrize(
    "absent",
    [
        ("domain_test",),
        ("domain_train",),
        ("domain_validation",),
        ("x_validation",),
        ("y_validation",),
        ("x_validation", "y_validation"),
        ("domain_train", "domain_test"),
    ],
)
def test_lonely_entries(absent: tuple[str, ...], tmp_path: Path) -> None:
    values = {name: entry for name, entry in full_entries().items() if name not in absent}
    refused_stream(Tensors(**values), f"data lacks {', '.join(absent)};", "to all splits")
    torch.save(values, tmp_path / "data.pt")
    refused_stream(TensorFile(str(tmp_path / "data.pt")), "data.path=", f"lacks {', '.join(absent)};")


def test_optional_entries_one_by_one() -> None:
    values = full_entries()
    only_validation = Tensors(**{name: entry for name, entry in values.items() if "domain" not in name})
    only_domains = Tensors(**{name: entry for name, entry in values.items() if "validation" not in name})
    for stream, expected in ((only_validation, ["test", "validation"]), (only_domains, ["test"])):
        stream.setup("fit")
        assert stream.evaluation_splits == expected
    refused_stream(Tensors(**values, validation_fraction=0.2), "data.validation_fraction", "of its own")


def test_file_lacks_entries(saved: Callable[[Entries], Path]) -> None:
    values = entries()
    path = saved({"x_train": values["x_train"], "y_test": values["y_test"], "more": torch.ones(2)})
    message = refused_stream(TensorFile(str(path)), "data.path=", str(path), "lacks the entries y_train, x_test")
    assert "it has more, x_train, y_test" in message


def test_truncated_file(saved: Callable[[Entries], Path]) -> None:
    path = saved(entries())
    content = path.read_bytes()
    for length in (0, 1, 8, 60, *range(100, len(content) - 1, len(content) // 25), len(content) - 1):
        path.write_bytes(content[:length])
        refused_stream(TensorFile(str(path)), "data.path=", str(path), "damaged")


def test_flipped_bytes(saved: Callable[[Entries], Path]) -> None:
    """A damaged file is either still readable, as far as anyone can tell, or refused."""
    path = saved(entries())
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 80):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        try:
            TensorFile(str(path)).setup("fit")
        except Exception as error:
            assert type(error).__name__ == "UserError", f"byte {position} of {path.name}"


@pytest.mark.parametrize("name", ["data.pt", "data.pth", "data.npz", "data.safetensors"])
def test_code_in_a_file_does_not_run(name: str, tmp_path: Path) -> None:
    path, marker = tmp_path / name, tmp_path / "ran"
    values = entries() | {"x_train": Bomb(marker)}
    for save in (
        lambda: path.write_bytes(pickle.dumps(values)),
        lambda: torch.save(values, path),
        lambda: np.savez(path, **entries() | {"x_train": np.array([Bomb(marker)], dtype=object)}),
    ):
        save()
        refused_stream(TensorFile(str(path)), "data.path=", str(path))
        assert not marker.exists()
    pickle.loads(pickle.dumps(values))
    assert marker.exists()  # it would have run


def test_object_arrays(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    arrays = {name: value.numpy() for name, value in entries().items()}
    np.savez(path, **arrays | {"x_train": np.array([[1.0], [2.0, 3.0]], dtype=object)})
    refused_stream(TensorFile(str(path)), "data.path=", str(path))
    np.savez(path, **arrays | {"y_train": np.array(["cat"] * 20)})
    refused_stream(TensorFile(str(path)), "data.path=", str(path))


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [1, 2],
        {"x_train": [1.0]},
        {},
        {0: torch.ones(2)},
        {"x_train": torch.ones(2), 1: torch.ones(2)},
    ],
)
def test_pt_without_the_entries(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    refused_stream(TensorFile(str(tmp_path / "data.pt")), "data.path=", str(tmp_path / "data.pt"))


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pt", tmp_path):
        refused_stream(TensorFile(str(path)), "data.path=", str(path), "no file")
    (tmp_path / "data.csv").write_text("1,2,3\n")
    refused_stream(TensorFile(str(tmp_path / "data.csv")), "data.path=", "data.csv")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.ones(3))
    refused_stream(TensorFile(str(tmp_path / "one.npz")), "data.path=", "one.npz")


NAN, INF = torch.randn(20, 3), torch.randn(8, 3)
NAN[4, 1], INF[7, 0] = float("nan"), -float("inf")
IMAGES = torch.zeros(20, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"y_train": torch.arange(20.0) % 4}, ("y_train must hold one integer", "torch.float32")),
        ({"y_test": torch.arange(8.0) % 4}, ("y_test must hold one integer", "torch.float32")),
        ({"y_train": torch.arange(19) % 4}, ("y_train", "20 samples", "(19,)")),
        ({"y_train": torch.zeros(20, 4, dtype=torch.long)}, ("y_train", "(20, 4)")),
        ({"y_train": torch.tensor(1)}, ("y_train", "()")),
        ({"x_test": torch.zeros(0, 3), "y_test": torch.zeros(0, dtype=torch.long)}, ("y_test", "0 samples")),
        ({"y_train": torch.arange(20) % 4 + 1}, ("train labels", "0 to 3", "got 4")),
        ({"y_test": torch.arange(8)}, ("test labels", "0 to 3", "got 4")),
        ({"y_test": torch.arange(8) % 4 - 1}, ("test labels", "got -1")),
        ({"x_train": NAN}, ("train inputs", "NaN", "sample 4")),
        ({"x_test": INF}, ("test inputs", "infinite", "sample 7")),
        ({"x_test": torch.zeros(8, 4)}, ("x_train and x_test", "same shape", "(3,)", "(4,)")),
        ({"x_train": IMAGES.flatten(1), "x_test": IMAGES[:8].flatten(1)}, ("uint8", "(20, 4)")),
        ({"x_train": IMAGES.unsqueeze(1), "x_test": IMAGES[:8].unsqueeze(1)}, ("uint8", "(20, 1, 2, 2)")),
        ({"x_train": IMAGES.int(), "x_test": IMAGES[:8].int()}, ("images as uint8", "(20, 2, 2)", "int32", "scale")),
        ({"x_train": IMAGES[..., None].to(torch.uint16)}, ("images as uint8", "(20, 2, 2, 1)", "uint16")),
        ({"x_train": torch.tensor(1.0)}, ("x_train",)),
        ({"x_test": torch.zeros(8, 3, dtype=torch.complex64)}, ("x_test", "complex64")),
        ({"x_train": IMAGES, "x_test": torch.zeros(8, 2, 2)}, ("same shape", "images", "uint8", "float32")),
        ({"x_validation": torch.zeros(12, 4)}, ("x_train and x_validation", "(3,)", "(4,)")),
        ({"x_validation": torch.full((12, 3), float("nan"))}, ("validation inputs", "NaN", "sample 0")),
        ({"y_validation": torch.arange(12)}, ("validation labels", "got 4")),
        ({"y_validation": torch.arange(11) % 4}, ("y_validation", "12 samples", "(11,)")),
        ({"domain_train": torch.zeros(20)}, ("domain_train must hold one integer", "torch.float32")),
        ({"domain_test": torch.zeros(7, dtype=torch.long)}, ("domain_test", "8 samples", "(7,)")),
        ({"domain_train": torch.arange(20) // 4 % 2 - 1}, ("train domains", "0 to 1", "got -1")),
        ({"domain_train": torch.arange(20) // 4 % 2 * 2}, ("train domains", "0 to 1", "got 2")),
        ({"domain_validation": torch.arange(12)}, ("validation domains", "0 to 1", "got 2")),
    ],
)
def test_refused_entries(changes: Entries, parts: tuple[str, ...], tmp_path: Path) -> None:
    optional = any("validation" in name or "domain" in name for name in changes)
    values = full_entries(**changes) if optional else entries(**changes)
    refused_stream(Tensors(**values), "data", *parts)
    path = tmp_path / "data.pt"
    torch.save(values, path)
    refused_stream(TensorFile(str(path)), *parts)


def test_num_classes() -> None:
    values = entries()
    refused_stream(Tensors(**values, num_classes=5), "train", "class 4")
    refused_stream(Tensors(**values, num_classes=3), "0 to 2", "got 3")
    stream = Tensors(**values, num_classes=6, increment=3)  # the second task has some of its classes
    stream.setup("fit")
    assert (stream.num_classes, stream.num_tasks) == (6, 2)


def test_one_number_a_sample() -> None:
    values = entries(x_train=torch.arange(20.0), x_test=torch.arange(8.0))
    assert batch(Tensors(**values))[0].flatten().tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_numbers_become_float32(dtype: torch.dtype) -> None:
    whole = torch.arange(24).view(8, 3)
    x, _, _ = batch(Tensors(**entries(x_train=torch.zeros(20, 3, dtype=dtype), x_test=whole.to(dtype))))
    assert x.dtype == torch.float32 and torch.equal(x, whole.float())


@pytest.mark.parametrize("colour", [False, True])
def test_images_get_the_transform_of_the_backbone(colour: bool) -> None:
    levels = torch.arange(8) * 30
    images = levels.view(8, 1, 1).expand(8, 5, 7)
    shades = [1, 1, 1]
    if colour:
        shades = [1, 0, 0.5]
        images = torch.stack([images, 0 * images, images // 2], dim=3)
    images = images.to(torch.uint8)
    values = entries(x_train=images.repeat(3, *[1] * (images.dim() - 1))[:20], x_test=images)
    backbone = TimmBackbone("test_resnet", image_size=32)
    x, _, _ = batch(Tensors(**values), backbone)
    assert x.shape == (8, 3, 32, 32) and x.dtype == torch.float32
    config = backbone.model.pretrained_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    expected = (levels.view(8, 1) * torch.tensor(shades) / 255 - mean) / std
    torch.testing.assert_close(x, expected.view(8, 3, 1, 1).expand(8, 3, 32, 32), atol=1e-5, rtol=0)
    assert backbone(x).shape == (8, backbone.num_features)


def test_features_get_no_transform() -> None:
    backbone = TimmBackbone("test_resnet", image_size=32)
    assert torch.equal(batch(Tensors(**entries()), backbone)[0], entries()["x_test"])
