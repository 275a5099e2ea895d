"""The feature cache: each image passes through the backbone once, whatever happens meanwhile."""

import copy
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import Tensor, nn
from torch import multiprocessing as mp
from torchvision.transforms import v2

from mh_lightning.backbones import Backbone
from mh_lightning.data import Digits, Tensors
from mh_lightning.data.features import FeatureCache, cache, extraction, store
from mh_lightning.data.features.__main__ import main
from mh_lightning.data.features.description import described
from mh_lightning.data.features.fingerprint import description_of, fingerprint, image_digests
from mh_lightning.data.labelled import Labelled, StreamDataset
from mh_lightning.data.perturbations import GaussianNoise, Unperturbed
from mh_lightning.data.splits import one_domain_a_perturbation
from mh_lightning.data.stored_features import StoredFeatures
from mh_lightning.errors import UserError
from tests.data.refusal import refused

IMAGES, FEATURES = 40, 6
CPU = torch.device("cpu")


class Counter:
    """Numbers that features do not depend on."""

    def __init__(self, pause: float) -> None:
        self.seen, self.pause, self.fail_after = 0, pause, float("inf")

    def feature_fingerprint(self) -> None:
        """Nothing."""


class Watched(Backbone):
    """A frozen linear map of small images that counts what it sees."""

    num_features = FEATURES

    def __init__(self, scale: float = 1.0, pause: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 6 * 6, FEATURES).requires_grad_(False)
        nn.init.normal_(self.linear.weight, std=scale, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.linear.bias)
        self.watched = Counter(pause)

    @property
    def seen(self) -> int:
        """Images."""
        seen: int = self.watched.seen
        return seen

    def transform(self, augment: bool) -> Callable[[Any], Tensor]:
        """Resize, and jitter to augment."""
        jitter = [v2.RandomCrop(5), v2.ColorJitter(brightness=0.5)] if augment else []
        return v2.Compose([*jitter, v2.Resize((6, 6)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, FEATURES)."""
        if self.seen >= self.watched.fail_after:
            raise RuntimeError("the power is off")
        self.watched.seen += len(x)
        time.sleep(self.watched.pause * len(x))
        return self.linear(x.flatten(1))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 8)


def images(count: int = IMAGES, seed: int = 0) -> Labelled:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 7, 9, 3), dtype=np.uint8)
    return Labelled(torch.from_numpy(pixels), np.zeros(count, dtype=np.int64))


def cached(
    folder: Path, backbone: Backbone, samples: Labelled | None = None, augment: bool = False, **options: Any
) -> StoredFeatures:
    samples = images() if samples is None else samples
    dataset = StreamDataset(samples, samples.labels, backbone.transform(augment))
    kept = FeatureCache(str(folder), **options)
    return kept.features(
        image_digests(samples), dataset.input, backbone, backbone.transform(augment), augment=augment, device=CPU
    )


def all_of(stored: StoredFeatures) -> Tensor:
    return stored.gather(np.arange(len(stored)))


def expected(backbone: Watched, samples: Labelled | None = None) -> Tensor:
    samples = images() if samples is None else samples
    dataset = StreamDataset(samples, samples.labels, backbone.transform(False))
    return backbone.linear(torch.stack([dataset.input(place) for place in range(len(dataset))]).flatten(1))


# --- what is stored


def test_images_pass_once(tmp_path: Path) -> None:
    backbone = Watched()
    torch.testing.assert_close(all_of(cached(tmp_path, backbone)), expected(backbone), rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES
    torch.testing.assert_close(all_of(cached(tmp_path, backbone)), expected(backbone), rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES  # all found
    rows = np.array([30, 3, 3, 12])
    twice = Labelled(images().inputs[rows], np.zeros(4, dtype=np.int64))
    stored = cached(tmp_path, backbone, twice)
    torch.testing.assert_close(all_of(stored), expected(backbone)[rows], rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES  # in another data set, the same images
    assert torch.equal(stored.take(np.array([2, 0])).gather([0, 1]), stored.gather([2, 0]))
    more = Labelled(torch.cat([images(5, seed=1).inputs, images().inputs]), np.zeros(45, dtype=np.int64))
    torch.testing.assert_close(all_of(cached(tmp_path, backbone, more)), expected(backbone, more), rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES + 5


def test_equal_images_pass_once(tmp_path: Path) -> None:
    backbone, rows = Watched(), np.array([0, 1, 0, 2, 1, 0] * 5)
    same = Labelled(images().inputs[rows], np.zeros(30, dtype=np.int64))
    # products of three images and of thirty may round otherwise
    torch.testing.assert_close(all_of(cached(tmp_path, backbone, same)), expected(backbone)[rows], rtol=1e-5, atol=1e-6)
    assert backbone.seen == 3


def test_features_are_mapped_into_memory(tmp_path: Path) -> None:
    stored = cached(tmp_path, Watched())
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    assert len(stored.shards) == IMAGES // 8
    assert sum(str(tmp_path) in line for line in maps.read_text().splitlines()) >= IMAGES // 8


@pytest.mark.parametrize("gains", [False, True])
def test_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: bool) -> None:
    monkeypatch.setattr(cache, "gains_from_bfloat16", lambda device: gains)
    backbone = Watched()
    stored = cached(tmp_path, backbone, dtype="float16")
    assert stored.shards[0].dtype == np.float16 and all_of(stored).dtype == torch.float32
    wanted = expected(backbone)
    if gains:
        assert not torch.equal(all_of(stored), wanted.half().float())
        torch.testing.assert_close(all_of(stored), wanted, rtol=0.05, atol=0.1)
        cached(tmp_path, backbone)  # float32 is computed in float32
        assert backbone.seen == 2 * IMAGES
    else:
        assert torch.equal(all_of(stored), wanted.half().float())
    assert isinstance(cache.gains_from_bfloat16(CPU), bool)


def test_workers(tmp_path: Path) -> None:
    backbone = Watched()
    stored = cached(tmp_path, backbone, num_workers=2)
    torch.testing.assert_close(all_of(stored), expected(backbone), rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES


def test_no_image(tmp_path: Path) -> None:
    nothing = Labelled(images().inputs[:0], np.zeros(0, dtype=np.int64))
    assert len(cached(tmp_path, Watched(), nothing)) == 0


# --- augmented views


def test_views(tmp_path: Path) -> None:
    stored = cached(tmp_path / "1", Watched(), augment=True, views=3)
    whole = np.concatenate([shard[np.argsort(stored.places[stored.places[:, 0] == number, 1])]
                            for number, shard in enumerate(stored.shards)])  # fmt: skip
    assert whole.shape == (IMAGES, 3, FEATURES)
    assert (np.abs(whole[:, 0] - whole[:, 1]).max(axis=1) > 1e-3).all()
    drawn = [stored.one_view_each(seed) for seed in (1, 1, 2)]
    assert torch.equal(all_of(drawn[0]), all_of(drawn[1])) and not torch.equal(all_of(drawn[0]), all_of(drawn[2]))
    assert set(drawn[0].views) == {0, 1, 2} and not stored.one_view_each(None).views.any()
    # whichever process draws them, in whichever order
    backwards = Labelled(torch.from_numpy(images().inputs.numpy()[::-1].copy()), np.zeros(IMAGES, dtype=np.int64))
    torch.manual_seed(5)
    again = cached(tmp_path / "2", Watched(), backwards, augment=True, views=3, num_workers=1)
    torch.testing.assert_close(all_of(again).flip(0), all_of(stored), rtol=0, atol=1e-6)


def test_random_numbers_of_the_run_are_left_alone(tmp_path: Path) -> None:
    backbone = Watched()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    cached(tmp_path, backbone, augment=True, views=2)
    after = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    assert torch.equal(after[0], torch.rand(3)) and (after[1] == np.random.rand(3)).all()  # noqa: NPY002


# --- what makes another entry


def test_fingerprints(tmp_path: Path) -> None:
    def of(change: Callable[[Watched], Any], augment: bool = False) -> str:
        backbone = Watched()
        change(backbone)
        return fingerprint(description_of(backbone, backbone.transform(augment)))

    def nothing(backbone: Watched) -> None:
        pass

    def nudge(backbone: Watched) -> None:
        backbone.linear.weight[0, 0] += 1e-6

    def activate(backbone: Watched) -> None:
        backbone.activation = nn.ReLU()

    def rename(backbone: Watched) -> None:
        backbone.settings = lambda: {"normalize_features": True}

    assert of(nothing) == of(nothing)
    prints = [of(nothing), of(nothing, augment=True), *map(of, (nudge, activate, rename))]
    assert len(set(prints)) == len(prints)
    for options in ({}, {"dtype": "float16"}, {"augment": True}, {"augment": True, "views": 2}):
        cached(tmp_path, Watched(), **options)
    nudged = Watched()
    nudge(nudged)
    cached(tmp_path, nudged)
    assert len(list(tmp_path.iterdir())) == 5


def test_digests_tell_images_apart(tmp_path: Path) -> None:
    flat = torch.arange(24, dtype=torch.uint8)
    shapes = [flat.view(1, 4, 6), flat.view(1, 6, 4), flat.view(1, 2, 4, 3)]
    digests = [image_digests(Labelled(shape, np.zeros(1, dtype=np.int64)))[0] for shape in shapes]
    assert len(set(digests)) == 3
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    files = Labelled([str(tmp_path / name) for name in "abc"], np.zeros(3, dtype=np.int64))
    one, same, other = image_digests(files)
    assert one == same != other
    files.inputs.append(str(tmp_path / "none"))
    refused(lambda: image_digests(files), "none", "cannot be read")


def test_digests_of_perturbed_images() -> None:
    kinds = [Unperturbed(), GaussianNoise(1.0, 0.1)]
    domains = one_domain_a_perturbation(images(3), len(kinds))
    digests = image_digests(domains, kinds, (0, 1))
    assert len(set(digests)) == 6
    assert image_digests(domains, kinds, (0, 1)) == digests
    assert set(image_digests(domains, kinds, (1, 1))).isdisjoint(digests)  # another noise
    stronger = image_digests(domains, [kinds[0], GaussianNoise(1.0, 0.2)], (0, 1))
    assert [a == b for a, b in zip(digests, stronger, strict=True)] == (domains.domain_of_sample == 0).tolist()
    part = domains.take(np.array([4, 1]))
    assert image_digests(part, kinds, (0, 1)) == [digests[4], digests[1]]


def test_what_cannot_be_told_apart_is_refused_and_not_cached(tmp_path: Path) -> None:
    class Logging(Watched):
        def __init__(self, file: Any) -> None:
            super().__init__()
            self.file = file

    with open(tmp_path / "log", "w") as file:
        refused(lambda: cached(tmp_path / "kept", Logging(file)), "feature_cache", "backbone[0].file", "TextIOWrapper")
    assert not (tmp_path / "kept").exists()


def test_features_of_another_activation_are_its_own(tmp_path: Path) -> None:
    class Activated(Watched):
        def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(super().forward(x))

    for activation in (torch.relu, torch.sin, lambda x: 2 * x):
        wanted = activation(expected(Watched()))
        torch.testing.assert_close(all_of(cached(tmp_path, Activated(activation))), wanted, rtol=1e-5, atol=1e-6)


class Scaled(nn.Module):
    """Its repr tells nothing."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale


def test_what_a_repr_does_not_tell() -> None:
    small = torch.tensor(0.48145466)
    settings = [1.0, 2.0, small, small + 1e-5, np.zeros(2000), np.eye(2000)[7], torch.relu, [Scaled(1)], Path,
                {"a": (1, None)}, partial(torch.clamp, min=0), partial(torch.clamp, min=1),
                v2.InterpolationMode.BICUBIC]  # fmt: skip
    kinds = [Scaled(setting) for setting in settings]
    texts = [json.dumps(described(x=kind)) for kind in kinds]
    assert len(set(texts)) == len(kinds)
    assert texts == [json.dumps(described(x=kind)) for kind in copy.deepcopy(kinds)]

    def of(change: Callable[[Watched], Any]) -> str:
        backbone = Watched()
        change(backbone)
        return fingerprint(description_of(backbone, None))

    changes: list[Callable[[Watched], Any]] = [
        lambda backbone: None,
        lambda backbone: setattr(backbone, "scale", 2.0),
        lambda backbone: setattr(backbone, "scale", 2.0 + 1e-9),
        lambda backbone: backbone.register_buffer("shift", torch.zeros(1), persistent=False),
        lambda backbone: backbone.register_buffer("shift", torch.ones(1), persistent=False),
        lambda backbone: setattr(backbone, "settings", lambda: {"dtype": "x"}),
    ]
    assert len(set(map(of, changes))) == len(changes)


# --- interruptions


def test_what_is_complete_is_kept(tmp_path: Path) -> None:
    for batches in range(6):
        folder, backbone = tmp_path / str(batches), Watched()
        backbone.watched.fail_after = 8 * batches
        if batches < 5:
            with pytest.raises(RuntimeError, match="power"):
                cached(folder, backbone)
        backbone.watched.fail_after = float("inf")
        torch.testing.assert_close(all_of(cached(folder, backbone)), expected(backbone), rtol=0, atol=1e-6)
        assert backbone.seen == IMAGES


def _extract(folder: str, pause: float, told: Any) -> None:
    torch.set_num_threads(1)
    extraction.SHARD_IMAGES = 8
    backbone = Watched(pause=pause)
    stored = cached(Path(folder), backbone)
    told.put((backbone.seen, all_of(stored).numpy()))


def test_a_killed_process_leaves_its_shards(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    victim = context.Process(target=_extract, args=(str(tmp_path), 0.02, context.Queue()))
    victim.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.rglob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    complete = 8 * len(list(tmp_path.rglob("*.safetensors")))
    assert 16 <= complete < IMAGES
    backbone = Watched()
    torch.testing.assert_close(all_of(cached(tmp_path, backbone)), expected(backbone), rtol=0, atol=1e-6)
    assert backbone.seen == IMAGES - complete
    (entry,) = tmp_path.iterdir()
    assert {path.suffix for path in entry.iterdir()} == {".json", ".safetensors"}  # no locks or parts are left


def test_processes_share_the_work(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    told = context.Queue()
    workers = [context.Process(target=_extract, args=(str(tmp_path), 0.01, told)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [told.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(seen for seen, _ in results) == IMAGES and max(seen for seen, _ in results) < IMAGES
    for _, features in results:
        torch.testing.assert_close(torch.from_numpy(features), expected(Watched()), rtol=0, atol=1e-6)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace(path: Path) -> None:
    """Other features under the images' digests, without their checksum."""
    tensors = load_file(path)
    save_file({"digests": tensors["digests"], "features": tensors["features"] + 1}, path)


def _swap(path: Path) -> None:
    """The same features, of other images, with the old checksum."""
    tensors = load_file(path)
    header = path.read_bytes()
    checksum = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    save_file({"digests": tensors["digests"].flip(0), "features": tensors["features"]}, path, checksum)


def _of_another_entry(path: Path) -> None:
    """An intact shard of the same images, but of another backbone."""
    cached(path.parents[1], Watched(scale=2.0))
    (other,) = [entry for entry in path.parents[1].iterdir() if entry != path.parent]
    path.write_bytes((other / path.name).read_bytes())
    assert main(["rm", str(other.parent), other.name]) == 0


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _replace, _swap, _of_another_entry])
def test_damaged_shards_are_redone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cached(tmp_path, Watched())
    path = sorted(tmp_path.rglob("*.safetensors"))[2]
    damage(path)
    assert main(["verify", str(tmp_path)]) == 1
    backbone = Watched()
    with pytest.warns(UserWarning, match=f"{path.name}.*is damaged"):
        stored = cached(tmp_path, backbone)
    torch.testing.assert_close(all_of(stored), expected(backbone), rtol=0, atol=1e-6)
    assert backbone.seen == 8
    assert main(["verify", str(tmp_path)]) == 0


def test_open_features_outlive_their_files(tmp_path: Path) -> None:
    backbone = Watched()
    stored = cached(tmp_path, backbone)
    assert main(["rm", str(tmp_path), "all"]) == 0
    torch.testing.assert_close(all_of(stored), expected(backbone), rtol=0, atol=1e-6)


def test_errors_of_the_system_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Watched()
    cached(tmp_path, backbone)

    def no_more_files(path: Path) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(store, "open_shard", no_more_files)
        refused(lambda: cached(tmp_path, backbone), "feature_cache.folder", "Too many open files")
    cached(tmp_path, backbone)
    assert backbone.seen == IMAGES


def test_images_of_a_damaged_shard_that_others_hold_too(tmp_path: Path) -> None:
    backbone = Watched()
    cached(tmp_path, backbone, images(8))
    (entry,) = tmp_path.iterdir()
    (first,) = entry.glob("*.safetensors")
    kept = first.read_bytes()
    first.unlink()
    cached(tmp_path, backbone)  # the same images in a shard of the same name
    (entry / "-copy.safetensors").write_bytes(kept)
    _flip(first)
    with pytest.warns(UserWarning, match="damaged"):
        cached(tmp_path, backbone)
    assert backbone.seen == 8 + IMAGES


def test_a_deleted_entry_is_made_again(tmp_path: Path) -> None:
    class Rival(Watched):
        def forward(self, x: Tensor) -> Tensor:
            if self.seen == 16:
                assert main(["rm", str(tmp_path), "all"]) == 0
            return super().forward(x)

    backbone = Rival()
    torch.testing.assert_close(all_of(cached(tmp_path, backbone)), expected(backbone), rtol=0, atol=1e-6)
    (entry,) = tmp_path.iterdir()
    assert backbone.seen == IMAGES + 16
    (entry / "entry.json").write_text("{")
    assert main(["ls", str(tmp_path)]) == main(["verify", str(tmp_path)]) == 0
    cached(tmp_path, backbone)
    assert json.loads((entry / "entry.json").read_text())["dtype"] == "float32"


# --- mistakes


def test_mistakes(tmp_path: Path) -> None:
    refused(lambda: FeatureCache("x", views=0), "feature_cache.views", "0")
    refused(lambda: FeatureCache("x", num_workers=-1), "feature_cache.num_workers", "-1")
    refused(lambda: FeatureCache(""), "feature_cache.folder", "empty")
    refused(lambda: FeatureCache("x", dtype="float8"), "feature_cache.dtype", "float8")
    trained = Watched()
    trained.linear.requires_grad_(True)
    refused(lambda: cached(tmp_path, trained), "feature_cache", "frozen=true")
    (tmp_path / "file").write_text("")
    refused(lambda: cached(tmp_path / "file", Watched()), "feature_cache.folder", "file")
    refused(lambda: cached(tmp_path, Watched(scale=float("inf"))), "NaN", "weights")
    refused(lambda: cached(tmp_path, Watched(scale=1e5), dtype="float16"), "float16", "float32")
    assert not list(tmp_path.rglob("*.lock"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    cached(tmp_path, Watched(), images(1))
    errors: list[UserError] = []  # their tracebacks hold all that failed
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        try:
            cached(tmp_path, Watched())
        except UserError as error:
            errors.append(error)
    assert "feature_cache.folder" in str(errors[0]) and "No space left" in str(errors[0])
    assert not list(tmp_path.rglob("*.lock"))
    assert len(cached(tmp_path, Watched())) == IMAGES


def test_another_function_in_training(tmp_path: Path) -> None:
    backbone = Watched()
    backbone.norm = nn.BatchNorm1d(3).requires_grad_(False)
    refused(lambda: cached(tmp_path, backbone), "BatchNorm1d", "evaluation mode")
    assert backbone.norm.training

    class Stays(Watched):
        def train(self, mode: bool = True) -> "Stays":
            return super().train(False)

    quiet = Stays()
    quiet.norm = nn.BatchNorm1d(3).requires_grad_(False)
    assert len(cached(tmp_path, quiet.train())) == IMAGES and not quiet.training


def test_every_module_that_asks_for_its_mode(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1) if self.training else x

    class Decorated(Noisy):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1) if self.training else x

    for part in (Noisy(), Decorated(), nn.RReLU(), DropPath(0.5), nn.Dropout(), nn.InstanceNorm1d(2)):
        backbone = Watched()
        backbone.part = part
        refused(lambda backbone=backbone: cached(tmp_path, backbone), type(part).__name__, "same in training")
        part.train = lambda mode, part=part: part  # it stays in training mode even where all others do not
        refused(lambda backbone=backbone: cached(tmp_path, backbone), type(part).__name__)
    for part in (nn.ReLU(), nn.GroupNorm(1, 2).requires_grad_(False), nn.Flatten()):
        backbone = Watched()
        backbone.part = part
        assert len(cached(tmp_path, backbone)) == IMAGES


def test_out_of_memory_halves_the_batch() -> None:
    sizes = []

    class Small(Watched):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            if len(x) > 10:
                raise torch.cuda.OutOfMemoryError
            return super().forward(x)

    forward = extraction.Forward(Small(), CPU, torch.float32)
    forward.batch_size = 32
    x = torch.randn(40, 3, 6, 6)
    torch.testing.assert_close(forward(x), Watched().linear(x.flatten(1)), rtol=0, atol=1e-6)
    assert sizes == [32, 16, 8, 8, 8, 8, 8] and forward.batch_size == 8

    class Tiny(Watched):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.cuda.OutOfMemoryError

    refused(lambda: extraction.Forward(Tiny(), CPU, torch.float32)(x), "one image", "image_size")


# --- the command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(tmp_path, Watched())
    cached(tmp_path, Watched(), dtype="float16")
    (tmp_path / "something_else").mkdir()
    assert main(["ls", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "float16" in shown and "40" in shown and "something_else" not in shown
    assert main(["rm", str(tmp_path), "something_else"]) == 2
    assert "something_else" in capsys.readouterr().err and (tmp_path / "something_else").exists()
    half, whole = sorted(
        (path for path in tmp_path.iterdir() if path.name.startswith("Watched")),
        key=lambda path: json.loads((path / "entry.json").read_text())["dtype"],
    )
    assert main(["rm", str(tmp_path), half.name]) == 0
    assert not half.exists() and whole.exists()
    assert main(["ls", str(tmp_path / "none")]) == 2


# --- streams


def attached(module: Any, backbone: Backbone | None) -> Any:
    """With a stand-in for the trainer."""
    module.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(backbone=backbone),
        strategy=SimpleNamespace(root_device=CPU),
        progress_bar_callback=None,
        is_global_zero=True,
        global_rank=0,
        world_size=1,
        current_epoch=0,
    )
    return module


def test_stream_without_a_trainer(tmp_path: Path) -> None:
    stream = Digits(feature_cache=FeatureCache(str(tmp_path)))
    with pytest.raises(UserError, match="needs a trainer"):
        stream.setup("fit")
    refused(lambda: Digits(feature_cache=FeatureCache("x", views=2)), "views=2", "augment=true")
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    features = attached(Tensors(x, y, x, y, feature_cache=FeatureCache(str(tmp_path))), Watched())
    refused(lambda: features.setup("fit"), "feature_cache", "leave it out")
