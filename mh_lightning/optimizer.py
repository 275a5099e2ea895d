"""Optimizing only the memory units that a step has touched."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mh_lightning.errors import UserError
from mh_lightning.layers import MHLinear


def memory_head_optimizer(
    module: nn.Module,
    optimizer: Callable[..., Optimizer] = torch.optim.SGD,
    *,
    params: Iterable[Any] | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer that treats every memory unit as a parameter of its own, and steps those with a gradient only.

    A unit is touched when its gradient is not all zero. The others keep their weights and their part of the optimizer's
    state bit for bit: no momentum carries them on, no weight decay shrinks them, and Adam's moments and step count
    are those of the steps that touched the unit. (torch's optimizers alone see one parameter M, whose untouched rows
    have zero gradients: they drift with momentum, and with Adam on stale moments.) Everything else in `module` is
    stepped as usual.

    Memory Heads are asked for sparse gradients, which spares writing and reading the rows of untouched units.
    ``clip_grad_norm_`` and ``GradScaler`` take them; for what does not, set ``layer.sparse_gradients = False``.

    Args:
        module: model with Memory Heads.
        optimizer: class of torch.optim, or any callable that makes an optimizer from parameters. It must call the
            closure, if there is one, before it looks at its parameters: LBFGS does not.
        params: parameters or parameter groups, by default all of the module that are trained.
        options: for the optimizer.

    Returns:
        An object of the optimizer's own class. Its state dict has an entry for each memory unit in place of each M.

    Raises:
        UserError: if the optimizer has no Memory Head's M to step.

    Example:
        >>> from mh_lightning import MHLinear
        >>> layer = MHLinear(4, 2, key_mem_units=8, delta=2, upd_m="WTA", upd_k="ad_hoc_WTA")
        >>> optimizer = memory_head_optimizer(layer, torch.optim.Adam, lr=0.01)
        >>> before = layer.M.detach().clone()
        >>> layer(torch.randn(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> (layer.M != before).any(2).sum().item()  # the winner's
        1
    """
    if params is None:
        params = [parameter for parameter in module.parameters() if parameter.requires_grad]
    made = optimizer(params, **options)
    stepped = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    layers = [layer for layer in module.modules() if isinstance(layer, MHLinear) and id(layer.M) in stepped]
    if not layers:
        raise UserError("memory_head_optimizer: module has no Memory Head that is trained; use torch.optim directly.")
    for layer in layers:
        layer.sparse_gradients = True
    _UnitSteps(made, [layer.M for layer in layers])
    return made


class _UnitSteps:
    """Puts units into an optimizer's groups in place of M, while it steps, saves and loads."""

    def __init__(self, optimizer: Optimizer, memories: list[nn.Parameter]) -> None:
        self.units = {id(memory): _Units(memory) for memory in memories}
        self.groups: list[list[Any]] | None = None
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        optimizer.register_state_dict_pre_hook(self.insert_all)
        optimizer.register_state_dict_post_hook(self.after_state_dict)
        optimizer.register_load_state_dict_pre_hook(self.before_load)
        optimizer.register_load_state_dict_post_hook(self.remove)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self.insert_touched(optimizer)
            return None

        def closure_then_insert() -> Any:
            loss = closure()
            self.insert_touched(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": closure_then_insert}

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.remove(optimizer)

    def after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.remove(optimizer)

    def before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.insert_all(optimizer)

    def insert_touched(self, optimizer: Optimizer) -> None:
        self._insert(optimizer, _Units.touched)

    def insert_all(self, optimizer: Optimizer) -> None:
        self._insert(optimizer, _Units.all)

    def _insert(self, optimizer: Optimizer, chosen: Callable[["_Units"], list[nn.Parameter]]) -> None:
        self.remove(optimizer)  # left in place by a step or a load that failed
        self.groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            params: list[nn.Parameter] = []
            for parameter in group["params"]:
                units = self.units.get(id(parameter))
                params += [parameter] if units is None else chosen(units)
            group["params"] = params

    def remove(self, optimizer: Optimizer) -> None:
        if self.groups is None:
            return
        for group, params in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = params
        self.groups = None
        for units in self.units.values():
            units.forget_gradients()


class _Units:
    """The units of a Memory Head as parameters that share their storage with M."""

    def __init__(self, memory: nn.Parameter) -> None:
        self.memory = memory
        self.parameters: dict[int, nn.Parameter] = {}
        self.place = memory.data_ptr()
        self.with_gradient: list[nn.Parameter] = []

    def touched(self) -> list[nn.Parameter]:
        grad = self.memory.grad
        if grad is None:
            return []
        numbers, grads = _rows(grad)
        self._follow()
        kept = (grads.amax(dim=1) != 0) | (grads.amin(dim=1) != 0)  # NaN is kept, to be seen
        for number, unit_grad, keep in zip(numbers, grads.unbind(0), kept.tolist(), strict=True):
            if keep:
                unit = self._unit(number)
                unit.grad = unit_grad
                self.with_gradient.append(unit)
        return self.with_gradient

    def all(self) -> list[nn.Parameter]:
        self._follow()
        sets, units, _ = self.memory.shape
        return [self._unit(number) for number in range(sets * units)]

    def forget_gradients(self) -> None:
        for unit in self.with_gradient:
            unit.grad = None
        self.with_gradient = []

    def _unit(self, number: int) -> nn.Parameter:
        if number not in self.parameters:
            self.parameters[number] = nn.Parameter(self._view(number))
        return self.parameters[number]

    def _view(self, number: int) -> Tensor:
        key_set, unit = divmod(number, self.memory.shape[1])
        return self.memory.detach()[key_set, unit]

    def _follow(self) -> None:
        """Look at M's weights where they are now: moving a module to another device gives it others."""
        if self.place != self.memory.data_ptr():
            self.place = self.memory.data_ptr()
            for number, unit in self.parameters.items():
                unit.data = self._view(number)


def _rows(grad: Tensor) -> tuple[list[int], Tensor]:
    """Numbers (t) of the units that a gradient of M (q, m, u) holds, and their gradients (t, u)."""
    _, units, size = grad.shape
    if not grad.is_sparse:
        rows = grad.reshape(-1, size)
        return list(range(len(rows))), rows
    key_sets, places = grad._indices().tolist()
    numbers = [key_set * units + place for key_set, place in zip(key_sets, places, strict=True)]
    if len(set(numbers)) < len(numbers):  # several backward passes
        return _rows(grad.coalesce())
    return numbers, grad._values()
