"""Optimizing only the memory units that a step has touched."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    Keys and counters of the Memory Heads move when the optimizer steps, as if all forwards back-propagated since the
    last step had been one batch, and not at the end of each backward pass. So a step that is skipped, as by
    ``GradScaler`` or after ``clip_grad_norm_(..., error_if_nonfinite=True)`` has raised, leaves them as they were: what
    waits is dropped with the gradients that it came with, whether the optimizer, a module or a loop of your own sets
    them to None or to zero. (In a process group, only the optimizer's ``zero_grad`` may set them to zero; others must
    set them to None.) A layer whose `defer_key_updates` is set is left to who has set it.

    Memory Heads are asked for sparse gradients, which spares writing and reading the rows of untouched units.
    ``GradScaler`` and, in torch 2.14 (not 2.6), ``clip_grad_norm_`` take them; for what does not, set
    ``layer.sparse_gradients = False``. Before another optimizer takes over, set that and
    ``layer.defer_key_updates = False``.

    Args:
        module: model with Memory Heads.
        optimizer: class of torch.optim, or any callable that makes an optimizer from parameters.
        params: parameters or parameter groups, by default all of the module that are trained.
        options: for the optimizer.

    Returns:
        An instance of the optimizer's class. Its state dict has an entry for each memory unit in place of each M; it
        can be saved and loaded, the optimizer itself cannot be copied or pickled.

    Raises:
        UserError: if the optimizer has no Memory Head's M to step, or cannot step units one by one.

    Example:
        >>> from mh_lightning import MHLinear
        >>> layer = MHLinear(4, 2, key_mem_units=8, delta=2, scramble=False)
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
    _require_steps_by_unit(made)
    layers = [layer for layer in module.modules() if isinstance(layer, MHLinear)]
    stepped = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if not any(id(layer.M) in stepped for layer in layers):
        raise UserError("memory_head_optimizer: module has no Memory Head that is trained; use torch.optim directly.")
    for layer in layers:
        layer.sparse_gradients = True
        layer.defer_key_updates_to_step()
    plain = type(made)
    # under a name of its own, or the plain one's would no longer name one class in configurations of this process
    made.__class__ = type(f"{plain.__name__}OfUnits", (_StepsUnits, plain), {})
    assert isinstance(made, _StepsUnits)
    memories = [memory for layer in layers for memory in (layer.M, *(follower.M for follower in layer.followers))]
    made.units_of = {id(memory): _Units(memory) for memory in memories}
    made.layers = layers
    return made


def _require_steps_by_unit(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    # Adagrad fills its state beforehand
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam) or optimizer.state:
        raise UserError(f"memory_head_optimizer: {name} cannot step units one by one; SGD, Adam and AdamW can.")
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            if group.get("fused") and group["momentum"]:  # torch wants all momentum buffers or none
                raise UserError(
                    "memory_head_optimizer: SGD with fused=True and momentum cannot step units one by one; "
                    "leave fused out."
                )


class _StepsUnits(Optimizer):
    """Goes before an optimizer's own class: puts units into its groups in place of M while it steps, saves or loads."""

    units_of: dict[int, "_Units"]
    layers: list[MHLinear]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # where the optimizer itself looks, it is told of gradients that are not finite, by GradScaler
        skipped = bool(getattr(self, "found_inf", False))
        for layer in self.layers:
            if layer.key_updates_wait_for_step:
                dropped = skipped or layer.gradients_are_gone
                (layer.drop_key_updates if dropped else layer.apply_key_updates)()
        with self._in_place_of_memories(_Units.touched):
            super().step()
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # hooks run inside, with the optimizer's own step

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for layer in self.layers:
            if layer.key_updates_wait_for_step:
                layer.drop_key_updates()

    def state_dict(self) -> dict[str, Any]:
        with self._in_place_of_memories(_Units.all):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self._in_place_of_memories(_Units.all):
            super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "memory_head_optimizer: its optimizer cannot be copied or pickled; make a new one and load its state_dict."
        )

    @contextmanager
    def _in_place_of_memories(self, chosen: Callable[["_Units"], dict[str, nn.Parameter]]) -> Iterator[None]:
        keys = ["params", "param_names"]
        replaced = [(group, {key: group[key] for key in keys if key in group}) for group in self.param_groups]
        try:
            for group, before in replaced:
                names = before.get("param_names", [""] * len(before["params"]))
                after: list[tuple[str, nn.Parameter]] = []
                for name, parameter in zip(names, before["params"], strict=True):
                    units = self.units_of.get(id(parameter))
                    if units is None:
                        after.append((name, parameter))
                    else:
                        after += [(name + place, unit) for place, unit in chosen(units).items()]
                        self.state.pop(parameter, None)  # an empty entry, made by looking
                group["params"] = [parameter for _, parameter in after]
                if "param_names" in before:
                    group["param_names"] = [name for name, _ in after]
            yield
        finally:
            # loading replaces the groups, in the same order
            for group, (_, before) in zip(self.param_groups, replaced, strict=True):
                group.update(before)
            for units in self.units_of.values():
                units.forget_gradients()


class _Units:
    """The units of a Memory Head as parameters that share their storage with M."""

    def __init__(self, memory: nn.Parameter) -> None:
        self.memory = memory
        self.parameters: dict[int, tuple[str, nn.Parameter]] = {}
        self.place = memory.data_ptr()
        self.with_gradient: dict[str, nn.Parameter] = {}

    def touched(self) -> dict[str, nn.Parameter]:
        """Units that have a gradient, by their place in M."""
        grad = self.memory.grad
        if grad is None:
            return {}
        numbers, grads = _rows(grad)
        self._follow()
        kept = (grads.amax(dim=1) != 0) | (grads.amin(dim=1) != 0)  # NaN is kept, to be seen
        for number, unit_grad, keep in zip(numbers, grads.unbind(0), kept.tolist(), strict=True):
            if keep:
                place, unit = self._unit(number)
                unit.grad = unit_grad
                self.with_gradient[place] = unit
        return self.with_gradient

    def all(self) -> dict[str, nn.Parameter]:
        """All units, by their place in M."""
        self._follow()
        sets, units, _ = self.memory.shape
        return dict(self._unit(number) for number in range(sets * units))

    def forget_gradients(self) -> None:
        for unit in self.with_gradient.values():
            unit.grad = None
        self.with_gradient = {}

    def _unit(self, number: int) -> tuple[str, nn.Parameter]:
        if number not in self.parameters:
            place = divmod(number, self.memory.shape[1])
            self.parameters[number] = (str(list(place)), nn.Parameter(self.memory.detach()[place]))
        return self.parameters[number]

    def _follow(self) -> None:
        """Look at M's weights where they are now: moving a module to another device gives it others."""
        if self.place != self.memory.data_ptr():
            self.place = self.memory.data_ptr()
            for number, (_, unit) in self.parameters.items():
                unit.data = self.memory.detach()[divmod(number, self.memory.shape[1])]


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
