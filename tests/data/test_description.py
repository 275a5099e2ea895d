"""Descriptions of backbones and transforms: nothing of what they do is left out, and nothing else is in them."""

import enum
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision import transforms
from torchvision.transforms import v2

from mh_lightning.backbones import Backbone, TimmBackbone
from mh_lightning.data.features.code import installed_version
from mh_lightning.data.features.description import described
from mh_lightning.data.features.fingerprint import description_of, fingerprint
from mh_lightning.errors import UserError
from tests.data.refusal import refused


class Net(Backbone):
    """Has an activation, wherever it is kept."""

    num_features = 2
    kind = "plain"

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).requires_grad_(False)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        vars(self).update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


class Wide(Net):
    kind = "wide"


class Slots:
    __slots__ = ("activation",)

    def __init__(self, activation: Any) -> None:
        self.activation = activation


@dataclass
class Options:
    activation: Any
    sizes: list[int] = field(default_factory=lambda: [1])


class Mode(enum.Enum):
    ADD = 1
    MULTIPLY = 2


class Holder:
    """Its method is put elsewhere."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def times(self, x: Tensor) -> Tensor:
        return x * self.scale


def of(backbone: Backbone, transform: Any = None) -> str:
    return fingerprint(description_of(backbone, transform))


def hooked(change: Callable[[nn.Module], Any]) -> Net:
    net = Net()
    change(net.linear)
    return net


def closed_over(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * value


def with_default(value: Any) -> Callable[..., Tensor]:
    def scaled(x: Tensor, *, by: Any = value) -> Tensor:
        return x * by

    return scaled


def written(body: str, name: str = "my_own_module", **scope: Any) -> Any:
    """What somebody's own file defines as `made`."""
    module = ModuleType(name)
    vars(module).update(scope)
    exec(compile(body, f"/nowhere/{name}.py", "exec"), vars(module))
    return module.made


FORWARD = "class made(Base):\n    def forward(self, x):\n        return {}\n"
CALLS = "def helper(x):\n    return x {}\nclass made(Base):\n    def forward(self, x):\n        return helper(x)\n"
IN_MODULE = "class made(Base):\n    def forward(self, x):\n        return helpers.inner.helper(x)\n"
IN_CLOSURE = "def made(x):\n    return [one {} for one in [x]] or (lambda: x {})()\n"


def helpers(operation: str) -> ModuleType:
    """A package of somebody's own."""
    package, inner = ModuleType("my_own_package"), ModuleType("my_own_package.inner")
    package.inner, package.unused = inner, open  # type: ignore[attr-defined]
    inner.helper = written(f"def made(x):\n    return x {operation}\n")  # type: ignore[attr-defined]
    return package


class_of_own = functools.partial(written, Base=Net)


def tagged(tensor: Tensor, scale: float) -> Tensor:
    """With a plain attribute."""
    tensor.scale = scale  # type: ignore[attr-defined]
    return tensor


def scaled_by(expression: str, scale: float) -> Backbone:
    """What finds a number in somebody's own module, in its own way."""
    module, package = ModuleType("my_own_numbers"), ModuleType("my_own_package")
    module.scale, package.inner = scale, module  # type: ignore[attr-defined]
    handed_on = written("def made(module):\n    return module.scale\n")
    backbone: Backbone = class_of_own(FORWARD.format(f"x * {expression}"), NUMBERS=module, PACKAGE=package,
                                      SCALE=scale, handed_on=handed_on)()  # fmt: skip
    return backbone


BY_TEXT = ("getattr(NUMBERS, 'scale')", "vars(NUMBERS)['scale']", "NUMBERS.__dict__['scale']", "globals()['SCALE']",
           "eval('SCALE')", "getattr(NUMBERS, 'sc' + 'ale'[len(x) * 0:])", "handed_on(NUMBERS)",
           "getattr(PACKAGE.inner, 'sc' + str(x)[:0] + 'ale')", "(lambda: vars(PACKAGE.inner)['scale'])()")  # fmt: skip

# of each kind, two backbones that give different features
PAIRS: dict[str, tuple[Backbone, Backbone]] = {
    "attribute": (Net(activation=torch.relu), Net(activation=torch.sin)),
    "dict": (Net(options={"act": torch.relu}), Net(options={"act": torch.sin})),
    "keys": (Net(options={1: 0}), Net(options={"1": 0})),
    "order": (Net(options={"a": 1, "b": 2}), Net(options={"b": 2, "a": 1})),
    "dataclass": (Net(options=Options(torch.relu)), Net(options=Options(torch.sin))),
    "list of dataclasses": (Net(options=[Options(1, [2])]), Net(options=[Options(1, [3])])),
    "list or tuple": (Net(index=[0, 1]), Net(index=(0, 1))),
    "1 or true": (Net(index=1), Net(index=True)),
    "slots": (Net(options=Slots(torch.relu)), Net(options=Slots(torch.sin))),
    "namespace": (Net(options=SimpleNamespace(a=1)), Net(options=SimpleNamespace(a=2))),
    "set": (Net(options={"a", "b", nn.ReLU}), Net(options={"a", "b", nn.GELU})),
    "class attribute": (Net(), Wide()),
    "module in a list": (Net(parts=[nn.LeakyReLU(0.1)]), Net(parts=[nn.LeakyReLU(0.2)])),
    "weights in a list": (Net(parts=[nn.Linear(1, 1)]), Net(parts=[nn.Linear(1, 1)])),
    "forward hook": (Net(), hooked(lambda part: part.register_forward_hook(lambda module, x, out: out * 2))),
    "another hook": (
        hooked(lambda part: part.register_forward_hook(lambda module, x, out: out * 3)),
        hooked(lambda part: part.register_forward_hook(lambda module, x, out: out * 2)),
    ),
    "pre-hook": (Net(), hooked(lambda part: part.register_forward_pre_hook(lambda module, x: (x[0] + 1,)))),
    "hook with keywords": (
        hooked(lambda part: part.register_forward_hook(print)),
        hooked(lambda part: part.register_forward_hook(print, with_kwargs=True)),
    ),
    "parametrization": (Net(), hooked(lambda part: parametrizations.orthogonal(part, "weight"))),
    "buffer that is not saved": (
        hooked(lambda part: part.register_buffer("shift", torch.zeros(1), persistent=False)),
        hooked(lambda part: part.register_buffer("shift", torch.ones(1), persistent=False)),
    ),
    "forward of one object": (Net(), Net(forward=lambda x: x)),
    "bound method": (Net(act=Holder(1.0).times), Net(act=Holder(2.0).times)),
    "method of a module": (Net(), hooked(lambda part: setattr(part, "forward", MethodType(lambda s, x: x, part)))),
    "enum": (Net(mode=Mode.ADD), Net(mode=Mode.MULTIPLY)),
    "partial": (
        Net(act=functools.partial(torch.clamp, min=0)),
        Net(act=functools.partial(torch.clamp, min=1)),
    ),
    "dtype": (Net(dtype=torch.float16), Net(dtype=torch.bfloat16)),
    "device": (Net(device=torch.device("cpu")), Net(device=torch.device("meta"))),
    "array": (Net(mean=np.zeros(2000)), Net(mean=np.eye(2000)[7])),
    "array of objects": (Net(mean=np.array([1, None])), Net(mean=np.array([2, None]))),
    "number of numpy": (Net(mean=np.float32(1)), Net(mean=np.float64(1))),
    "tensor": (Net(mean=torch.tensor(0.48145466)), Net(mean=torch.tensor(0.48146466))),
    "generator": (Net(draw=np.random.default_rng(0)), Net(draw=np.random.default_rng(1))),
    "closure": (Net(act=closed_over(1)), Net(act=closed_over(2))),
    "default": (Net(act=with_default(1)), Net(act=with_default(2))),
    "cached function": (
        Net(act=functools.lru_cache(closed_over(1))),
        Net(act=functools.lru_cache(closed_over(2))),
    ),
    "code": (class_of_own(FORWARD.format("x + 1"))(), class_of_own(FORWARD.format("x + 2"))()),
    "operation": (class_of_own(FORWARD.format("x + 1"))(), class_of_own(FORWARD.format("x - 1"))()),
    "global of the code": (
        class_of_own(FORWARD.format("x * SCALE"), SCALE=1)(),
        class_of_own(FORWARD.format("x * SCALE"), SCALE=2)(),
    ),
    "function that the code calls": (class_of_own(CALLS.format("+ 1"))(), class_of_own(CALLS.format("+ 2"))()),
    "function of a package": (
        class_of_own(IN_MODULE, helpers=helpers("+ 1"))(),
        class_of_own(IN_MODULE, helpers=helpers("+ 2"))(),
    ),
    "code in code": (
        Net(act=written(IN_CLOSURE.format("+ 1", "* 1"))),
        Net(act=written(IN_CLOSURE.format("+ 1", "* 2"))),
    ),
    "attribute of a weight": (
        hooked(lambda part: tagged(part.weight, 1.0)),
        hooked(lambda part: tagged(part.weight, 2.0)),
    ),
    "attribute of a tensor": (Net(mean=tagged(torch.ones(1), 1.0)), Net(mean=tagged(torch.ones(1), 2.0))),
    **{expression: (scaled_by(expression, 1.0), scaled_by(expression, 2.0)) for expression in BY_TEXT},
    "mode that stays": (Net(), hooked(lambda part: setattr(part, "train", lambda mode: part))),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_what_differs_is_told_apart(kind: str) -> None:
    one, other = PAIRS[kind]
    assert of(one) != of(other)
    assert of(one) == of(one) and of(other) == of(other)


@pytest.mark.parametrize("kind", PAIRS)
def test_what_differs_in_a_transform_is_told_apart(kind: str) -> None:
    one, other = PAIRS[kind]
    assert of(Net(), one) != of(Net(), other)


def test_transforms() -> None:
    def steps(*more: Any) -> Any:
        return v2.Compose([v2.Resize((6, 6)), *more, v2.ToImage()])

    kinds = [
        steps(),
        steps(v2.CenterCrop(5)),
        steps(v2.CenterCrop(4)),
        steps(v2.Lambda(lambda image: image)),
        steps(v2.Lambda(lambda image: image.rotate(90))),
        steps(transforms.Lambda(closed_over(1))),
        steps(transforms.Lambda(closed_over(2))),
        steps(v2.Normalize([0.5], [1.0])),
        steps(v2.Normalize([0.5], [1.0 + 1e-9])),
        v2.Resize((6, 6), v2.InterpolationMode.BICUBIC),
        v2.Resize((6, 6), v2.InterpolationMode.NEAREST),
        transforms.AutoAugment(),
        None,
    ]
    assert len({of(Net(), kind) for kind in kinds}) == len(kinds)


def test_a_hook_of_all_modules() -> None:
    before = of(Net())
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, out: out + 1)
    try:
        assert of(Net()) != before
    finally:
        handle.remove()
    assert of(Net()) == before


def test_a_function_put_into_a_class_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(Net())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert of(Net()) != before


@pytest.mark.parametrize(
    "forward",
    [nn.Tanh.forward, torch.tanh, F.gelu, nn.ReLU.extra_repr, property(lambda self: torch.tanh)],
    ids=["of another class", "in C", "of another module", "of the same class", "property"],
)
def test_what_is_put_into_a_class_of_torch(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(Net(act=nn.ReLU()))
    monkeypatch.setattr(nn.ReLU, "forward", forward)
    assert of(Net(act=nn.ReLU())) != before


@pytest.mark.parametrize("relu", [lambda x: x, F.gelu], ids=["own", "gelu"])
def test_what_is_put_into_a_module_of_torch_that_own_code_calls(relu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = class_of_own(FORWARD.format("F.relu(x)"), F=F)()
    before = of(backbone)
    monkeypatch.setattr(F, "relu", relu)
    assert of(backbone) != before


def test_tensors_in_a_circle() -> None:
    tensor = tagged(torch.ones(1), 1.0)
    tensor.other = tagged(torch.ones(1), 2.0)  # type: ignore[attr-defined]
    tensor.other.other = tensor  # type: ignore[attr-defined]
    assert of(Net(mean=tensor)) == of(Net(mean=tensor)) != of(Net(mean=torch.ones(1)))


def test_what_does_not_matter() -> None:
    """The file and line of code, the mode, gradients, the layout in memory, and the number of a hook."""
    lower = written("\n\n\n" + FORWARD.format("x + 1"), Base=Net)
    assert of(lower()) == of(class_of_own(FORWARD.format("x + 1"))())
    assert of(Net().eval()) == of(Net().train()) == of(Net().requires_grad_(True))
    transposed = Net()
    transposed.linear.weight.data = transposed.linear.weight.data.T.contiguous().T
    assert of(transposed) == of(Net())
    hooks = [hooked(lambda part: part.register_forward_hook(print)) for _ in range(2)]
    assert of(hooks[0]) == of(hooks[1])


def test_circles() -> None:
    def circle(value: int) -> Net:
        net = Net(above=SimpleNamespace(value=value))
        net.above.below = net.linear.forward
        net.above.all = [net.above]
        return net

    assert of(circle(1)) == of(circle(1)) != of(circle(2))
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert of(Net(deep=deep)) != of(Net(deep=[deep]))


# --- what cannot be described


@pytest.mark.parametrize("kind", ["file", "lock", "generator", "meta", "quantized", "traced", "ufunc"])
def test_what_cannot_be_described_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file") as file:
        held: dict[str, Callable[[], Any]] = {
            "file": lambda: file,
            "lock": threading.Lock,
            "generator": lambda: (one for one in "ab"),
            "meta": lambda: torch.zeros(1, device="meta"),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "ufunc": lambda: np.frompyfunc(lambda number: number + 1, 1, 1),
            "traced": lambda: torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)),
        }
        options = Options([held[kind]()])
        message = refused(lambda: of(Net(options=options)), "data.feature_cache", "feature_fingerprint()", "leave the")
        assert "model.init_args.backbone[0].options.activation[0]" in message
        refused(
            lambda: of(Net(), closed_over(options)), "model.init_args.backbone's transform", "feature_fingerprint()"
        )


class Described(Net):
    """Says itself what it is."""

    def feature_fingerprint(self) -> Any:
        return self.version


class Undescribed(Described):
    """Has something more, of which its parent's word knows nothing."""


def test_what_cannot_be_described_may_say_what_it_is() -> None:
    def made(version: Any = 1, kind: type[Described] = Described) -> Described:
        return kind(version=version, lock=threading.Lock())

    assert of(made()) == of(made()) != of(made(version=2))
    changed = made()
    changed.linear.weight[0, 0] += 1e-6  # weights are told anyway
    assert of(changed) != of(made())
    refused(lambda: of(made(kind=Undescribed)), "a lock", "feature_fingerprint()")
    refused(lambda: of(made(version=threading.Lock())), "feature_fingerprint()")


# --- processes and speed

STABLE = """
import json, torch
from mh_lightning.backbones import ModuleBackbone, TimmBackbone
from mh_lightning.data.features.fingerprint import description_of, fingerprint
from torchvision.transforms import v2

class Net(torch.nn.Module):
    kinds = {"a", "b", "c", torch.nn.ReLU, torch.nn.GELU, 3, None}
    def forward(self, x):
        return x.flatten(1) if "a" in {"a", "b", "c"} else x

torch.manual_seed(0)
prints = []
for name in ("test_resnet", "test_vit", "test_efficientnet"):
    backbone = TimmBackbone(name)
    for augment in (False, True):
        prints.append(fingerprint(description_of(backbone, backbone.transform(augment))))
print(*prints, fingerprint(description_of(ModuleBackbone(Net()), v2.Lambda(lambda image: image))))
"""


def test_the_same_in_every_process() -> None:
    told = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": seed}
        process = subprocess.run(
            [sys.executable, "-c", STABLE], env=environment, capture_output=True, text=True, timeout=300
        )
        told.append(process.stdout.split())
        assert len(set(told[-1])) == 7, process.stderr
    assert told[0] == told[1]


def test_usual_backbones_need_no_word_and_little_work() -> None:
    """What installed packages do is told by their versions: few nodes beside those of a network's 122 tensors."""
    backbone = TimmBackbone("resnet18")
    for augment in (False, True):
        assert len(described(backbone=backbone, transform=backbone.transform(augment))) < 600


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_nfnet", "test_maxvit"])
def test_a_forward_changes_no_description(name: str) -> None:
    backbone = TimmBackbone(name)
    before = of(backbone, backbone.transform(False))
    backbone(torch.zeros(2, *backbone._data_config["input_size"]))
    assert of(backbone, backbone.transform(False)) == before


def test_installed_packages_are_known_by_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_version("torch.nn") == importlib.metadata.version("torch")
    assert installed_version("PIL.Image") is not None and installed_version("json") is not None
    assert installed_version("tests.data") is None and installed_version("__main__") is None
    assert installed_version(None) is None and installed_version("no_such_module_anywhere") is None
    for name, origin, known in (("mine_by_folder", '{"dir_info": {}}', False), ("mine_by_index", "{}", True)):
        (tmp_path / f"{name}.py").write_text("")
        metadata = tmp_path / f"{name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (metadata / "direct_url.json").write_text(origin)
        monkeypatch.syspath_prepend(tmp_path)
        assert installed_version(name) == ("1.2" if known else None)


def test_values_are_told_by_what_they_are() -> None:
    values: list[Any] = [None, 0, False, 0.0, "0", b"0", "", (), [], {}, set(), frozenset({1}), OrderedDict(), 0j,
                         range(1), ..., object, torch.zeros(1), torch.zeros(1, 1), torch.zeros(1).half(),
                         np.zeros(1), list[int], int | None, torch.relu, torch.Tensor.relu, np.exp, np.dot]  # fmt: skip
    texts = [json.dumps(described(x=value)) for value in values]
    assert len(set(texts)) == len(values)


def test_an_error_in_a_word_is_the_users(tmp_path: Path) -> None:
    class Broken:
        def feature_fingerprint(self) -> Any:
            raise RuntimeError("no idea")

    with pytest.raises(UserError, match="no idea"):
        described(x=Broken())
