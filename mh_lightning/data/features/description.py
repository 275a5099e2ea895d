"""Complete descriptions of objects: two that could compute different things are never described alike, but for what
`described` says that it does not see.
"""

import copyreg
import inspect
import json
import pickle
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from enum import EnumType
from functools import cached_property
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mh_lightning.data.features.code import (
    described_code,
    globals_of,
    installed_version,
    is_found,
    is_special,
    modules_as_values,
    names_in,
)
from mh_lightning.data.features.digest import digest, digest_of_tensor
from mh_lightning.errors import UserError, reason_of

ATOMS = (type(None), bool, int, float, str)
OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
OF_ROUTINES = (BuiltinFunctionType, ClassMethodDescriptorType, MethodDescriptorType, MethodWrapperType,
               WrapperDescriptorType)  # fmt: skip
OF_DESCRIPTORS = (MemberDescriptorType, GetSetDescriptorType)
# what torch keeps in every module: parts, hooks and the mode are told one by one, the rest does not run in a forward
OF_MODULES = {*vars(nn.Module()), "_compiled_call_impl"} - {"training"}
METADATA_OF_TIMM = {"pretrained_cfg", "default_cfg"}  # where weights came from
# of classes: what is no part of what they do, or follows from the rest
OF_CLASSES = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "_abc_impl",
              "__static_attributes__", "__abstractmethods__", "__annotations__", "__annotate__", "__annotate_func__",
              "__annotations_cache__"}  # fmt: skip
OF_COMPILER = "_dynamo"  # how attributes begin that torch.compile gives to tensors
OWN_WORD = "feature_fingerprint"


def described(**objects: Any) -> list[Any]:
    """What objects do and hold, in values that JSON takes, the same in every process.

    Each object is one node of a graph: a class, function or module of an installed package is told by its name and
    version, one of somebody's own by its code and all that the code uses; an instance by its class and attributes;
    a tensor by its values. An object whose class defines a method ``feature_fingerprint()`` is told by the class's name
    and what that returns, a module also by its parameters, buffers, hooks and parts.

    Not seen is what somebody has changed in an installed package, but for methods of the classes that are met, and
    functions that somebody's own code names: ``F.relu = F.gelu`` is not, where only the package's code calls it. Nor is
    what code finds through `sys.modules` and `importlib`, or by made-up names in modules that its functions import.

    Args:
        objects: by the names that an error says.

    Raises:
        UserError: if an object cannot be told completely, such as an open file.

    Example:
        >>> described(x={"scale": (1, 0.5), "act": torch.relu}) == described(x={"scale": (1, 0.5), "act": torch.tanh})
        False
        >>> described(x=lambda image: image + 1) == described(x=lambda image: image + 1)
        True
    """
    return _Describer(frozenset()).nodes_of(objects)


class _Describer:
    """Numbers objects in the order in which it meets them.

    Args:
        sets: those, by id, that hold what is described; each element of a set is described for itself, since sets have
            no order that lasts.
    """

    def __init__(self, sets: frozenset[int]) -> None:
        self.sets = sets
        self.numbers: dict[int, int] = {}
        self.tensors: dict[int, Any] = {}
        self.waiting: deque[tuple[Any, str]] = deque()
        self.kept: list[Any] = []  # an id is that of one object only as long as this lives
        self.path = ""

    def nodes_of(self, objects: dict[str, Any]) -> list[Any]:
        nodes: list[Any] = []
        for name, value in objects.items():
            self.path = name
            nodes.append([name, self.refer(value)])
        while self.waiting:
            value, self.path = self.waiting.popleft()
            try:
                nodes.append(self._node(value))
            except UserError:
                raise
            except Exception as error:  # whatever an object does when it is asked for its state
                raise self._refusal(value, error) from error
        return nodes

    def _refusal(self, value: Any, error: Exception) -> UserError:
        return UserError(
            f"data.feature_cache: {self.path} is a {type(value).__qualname__}, which cannot be told apart from others "
            f"({reason_of(error)}); give the class that holds it a method {OWN_WORD}() that returns all that features "
            "depend on as plain values, or leave the cache out."
        )

    def refer(self, value: Any, part: str = "") -> Any:
        """A value itself if it is plain, otherwise its number."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind is bytes:
            return ["bytes", digest(value)]
        if kind is tuple:
            return ["tuple", *(self.refer(one, f"{part}[{place}]") for place, one in enumerate(value))]
        if kind in (set, frozenset):
            return self._set(value)
        if isinstance(value, Tensor):
            return self._tensor(value, part)
        if isinstance(value, OF_TORCH):
            return ["torch", str(value)]
        if kind is CodeType:
            return described_code(value, self.refer)
        if kind is MethodType:
            return ["method", self.refer(value.__self__, part), self.refer(value.__func__, part)]
        if isinstance(value, weakref.ref):
            return ["weak", self.refer(value(), part)]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.numbers)
            self.kept.append(value)
            self.waiting.append((value, self.path + part))
        return ["object", self.numbers[id(value)]]

    def _set(self, value: set[Any] | frozenset[Any]) -> list[Any]:
        if id(value) in self.sets:
            return ["set that holds this"]
        inside = self.sets | {id(value)}
        return ["set", sorted(json.dumps(_Describer(inside).nodes_of({self.path: one})) for one in value)]

    def _tensor(self, value: Tensor, part: str) -> Any:
        if id(value) not in self.tensors:
            self.kept.append(value)
            try:
                content = digest_of_tensor(value)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                self.path += part
                raise self._refusal(value, error) from error
            told: list[Any] = ["tensor", str(value.dtype), list(value.shape), content]
            self.tensors[id(value)] = told  # already, since an attribute may lead back
            if attributes := self._named(vars(value), {name for name in vars(value) if name.startswith(OF_COMPILER)}):
                self.tensors[id(value)] = [*told, attributes]
        return self.tensors[id(value)]

    def _node(self, value: Any) -> list[Any]:
        kind = type(value)
        if kind is list:
            return ["list", *(self.refer(one, f"[{place}]") for place, one in enumerate(value))]
        if kind in (dict, MappingProxyType):
            return ["dict", *([self.refer(key), self.refer(one, f"[{key!r}]")] for key, one in value.items())]
        if isinstance(value, type):
            return self._class(value)
        if kind is FunctionType:
            return self._function(value)
        if isinstance(value, property):
            return ["property", *map(self.refer, (value.fget, value.fset, value.fdel))]
        if isinstance(value, staticmethod | classmethod):
            return [kind.__name__, self.refer(value.__func__)]
        if isinstance(value, cached_property):
            return ["cached_property", self.refer(value.func)]
        if isinstance(value, OF_DESCRIPTORS):
            return ["descriptor", value.__name__]
        if isinstance(value, RemovableHandle):
            return ["handle"]  # of a hook, which is told where it is
        if isinstance(value, OF_ROUTINES):
            return self._routine(value)
        if kind is ModuleType:
            return self._module(value, set(vars(value)), set())
        if isinstance(value, nn.Module):
            return self._network(value)
        return self._instance(value)

    def _named(self, values: Mapping[str, Any], left_out: set[str] | frozenset[str] = frozenset()) -> list[Any]:
        return [[name, self.refer(one, f".{name}")] for name, one in values.items() if name not in left_out]

    def _class(self, value: type) -> list[Any]:
        module = value.__module__ if isinstance(value.__module__, str) else None  # some written in C hide it
        version = installed_version(module)
        name, attributes = [module, value.__qualname__], dict(vars(value))
        if version is not None and is_found(value):
            changed = {name: one for name, one in attributes.items() if _is_put_in(one, name, value)}
            return ["class", *name, version, self._named(changed)]
        meta = [] if type(value) is type else [self.refer(type(value))]
        return [
            "class",
            *name,
            version,
            meta,
            list(map(self.refer, value.__bases__)),
            self._named(attributes, OF_CLASSES),
        ]

    def _function(self, value: FunctionType) -> list[Any]:
        scope = value.__globals__
        version = installed_version(scope.get("__name__"))
        if version is not None and installed_version(value.__module__) is not None and is_found(value):
            return ["function", value.__module__, value.__qualname__, version]
        used = []
        if version is None:
            names = set(names_in(value.__code__))
            for name, one in dict(globals_of(value.__code__, scope)).items():
                told = self._module(one, names, set()) if isinstance(one, ModuleType) else self.refer(one, f".{name}")
                used.append([name, told])
            used += [[one.__name__, self.refer(one)] for one in modules_as_values(value.__code__, scope)]
        enclosed = inspect.getclosurevars(value).nonlocals if value.__closure__ else {}
        defaults = [self.refer(value.__defaults__), self.refer(value.__kwdefaults__)]
        return ["function", version, self.refer(value.__code__), defaults, self._named(dict(enclosed)), used,
                self._named(vars(value))]  # fmt: skip

    def _routine(self, value: Any) -> list[Any]:
        """A function written in C, and the object that it belongs to."""
        owner = getattr(value, "__self__", None)
        kind = getattr(value, "__objclass__", None)
        module = getattr(value, "__module__", None) or getattr(kind or owner, "__module__", None)
        bound_to = None if isinstance(owner, ModuleType) else self.refer(owner)
        return ["routine", module, value.__qualname__, installed_version(module), bound_to, self.refer(kind)]

    def _module(self, value: ModuleType, names: set[str], above: set[str]) -> list[Any]:
        """Of somebody's own module what has one of the names; of an installed one what somebody has put there."""
        version = installed_version(value.__name__)
        if version is not None:
            changed = {name: one for name, one in vars(value).items() if name in names and _is_put_in(one, name, value)}
            return ["module", value.__name__, version, *self._named(changed)]
        if value.__name__ in above:
            return ["module", value.__name__, version]
        parts = []
        for name, one in sorted(vars(value).items()):
            if name in names and not is_special(name):
                inside = isinstance(one, ModuleType)
                parts.append([name, self._module(one, names, above | {value.__name__}) if inside else self.refer(one)])
        return ["module", value.__name__, parts]

    def _network(self, value: nn.Module) -> list[Any]:
        """Parameters, buffers, parts and hooks, then the rest."""
        if type(value).__qualname__ == "OptimizedModule":  # compiled, it does the same
            return ["compiled", self.refer(value._orig_mod)]
        hooks = []
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in getattr(value, kind).items():
                manner = [key in getattr(value, f"{kind}_{manner}", ()) for manner in ("with_kwargs", "always_called")]
                hooks.append([kind, self.refer(hook, f".{kind}"), manner])
        parts = [self._named(value._parameters), self._named(value._buffers), self._named(value._modules), hooks]
        if OWN_WORD in vars(type(value)):
            return ["network", *parts, *self._own_word(value)]
        left_out = OF_MODULES
        if any(base.__module__.startswith("timm.") for base in type(value).__mro__):
            left_out = left_out | METADATA_OF_TIMM
        if isinstance(value, torch.fx.GraphModule):
            left_out = left_out | {"_graph"}  # which its code is made of
        return ["network", self.refer(type(value)), *parts, self._attributes(value, left_out)]

    def _attributes(self, value: Any, left_out: set[str] | frozenset[str] = frozenset()) -> list[Any]:
        """Of an object's dictionary and slots."""
        state: Any = object.__getstate__(value)
        return [self._named(part or {}, left_out) for part in (state if isinstance(state, tuple) else (state,))]

    def _own_word(self, value: Any) -> list[Any]:
        kind = type(value)
        return ["says", kind.__module__, kind.__qualname__, self.refer(getattr(value, OWN_WORD)())]

    def _instance(self, value: Any) -> list[Any]:
        """What makes an object again, as `copy` and `pickle` ask for it, and its attributes."""
        kind = type(value)
        if OWN_WORD in vars(kind):
            return self._own_word(value)
        plain = not _defines(kind, "__reduce__", "__reduce_ex__")
        reduce = copyreg.dispatch_table.get(kind)
        reduction = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(reduction, str):  # a name
            attributes = getattr(value, "__dict__", {})
            if not attributes:  # such as the function that is cached
                _require_found(value, reduction)
            return ["named", self.refer(kind), reduction, self._named(attributes)]
        made_by, arguments, *rest = [list(part) if isinstance(part, Iterator) else part for part in reduction]
        if plain and not _defines(kind, "__getstate__"):
            rest[:1] = [None]  # these are the attributes
        own = plain or installed_version(kind.__module__) is None
        attributes = self._attributes(value) if own else None
        return ["instance", self.refer(kind), self.refer(made_by), self.refer(arguments), list(map(self.refer, rest)),
                attributes]  # fmt: skip


def _defines(kind: type, *names: str) -> bool:
    """Whether a class or one of its bases has methods of these names of its own."""
    return any(name in vars(base) for base in kind.__mro__ if base is not object for name in names)


def _require_found(value: Any, name: str) -> None:
    """See that an object that calls itself by a name is the one that has it: `np.frompyfunc` makes others.

    Raises:
        LookupError: if it is not.
    """
    found: Any = sys.modules.get(pickle.whichmodule(value, name))  # type: ignore[attr-defined]
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise LookupError(f"it calls itself {name}, which is another object")


def _is_put_in(value: Any, name: str, place: type | ModuleType) -> bool:
    """Whether somebody has put a function into an installed class or module, as far as can be told: a function of their
    own, or one of another name or class.
    """
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    if isinstance(value, FunctionType) and installed_version(value.__globals__.get("__name__")) is None:
        return True
    if is_special(name) or isinstance(place, EnumType):  # classes share these
        return False
    if not isinstance(value, FunctionType | BuiltinFunctionType):
        return False
    if isinstance(place, ModuleType):  # whose functions come from many others
        return value.__name__ != name
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is not place
    owner = value.__qualname__.rpartition(".")[0]
    if owner == place.__qualname__:
        return not name.endswith(value.__name__)  # `_Class__name` is that of `__name`
    return owner != "" or value.__module__ != place.__module__
