"""What a run costs: time, memory, and the state that the method keeps."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mh_lightning.callbacks.run import current_task, is_fitting
from mh_lightning.errors import UserError, require

CLEAR_PEAK = "5"  # see proc(5), clear_refs


class CostMonitor(Callback):
    """Measures a fit; `ContinualMetrics` writes what it found into results.json, as ``cost``.

    - ``samples_per_second``: the stream's training samples, each counted as often as it came, over the seconds of
      training, evaluation left out. What a method replays or learns again takes time, but does not count.
    - ``state_bytes``: of the method's state at the end: head, counters, statistics, replay buffer, and what is, or was,
      trained of the backbone. What is frozen of it, or the optimizer holds, is left out.
    - ``peak_memory_bytes``: the most that was in use on rank 0 at a time: of the GPU, or else of the whole process,
      Python and libraries included. Where the system cannot reset its peak, this includes what came before the fit.

    One budget for all that methods add, be it outputs, exemplars or statistics, is a limit on ``state_bytes``, as in
    LibContinual; a method whose state does not fit is refused before it learns, or when a task has made it too large.

    Args:
        max_state_bytes: at least 1; None for no limit.

    Raises:
        UserError: if the state takes more than that.
    """

    def __init__(self, max_state_bytes: int | None = None) -> None:
        if max_state_bytes is not None:
            require("CostMonitor: max_state_bytes", max_state_bytes, at_least=1)
        self.max_state_bytes = max_state_bytes
        self._samples, self._seconds = 0, 0.0
        self._last = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the peak of what came before."""
        self._check(pl_module, "before the first task")
        _reset_peak(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, in a resumed run in the middle of an epoch."""
        self._last = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        now = time.monotonic()
        self._seconds += now - self._last
        self._last = now
        method: Any = pl_module
        self._samples += len(batch[1]) if trainer.world_size == 1 else method.rows_of_batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave evaluation out."""
        if is_fitting(trainer):
            self._check(pl_module, f"after task {current_task(trainer) + 1}")
        self._last = time.monotonic()

    def _check(self, pl_module: LightningModule, when: str) -> None:
        if self.max_state_bytes is None:
            return
        needed = state_bytes(pl_module)
        if needed > self.max_state_bytes:
            raise UserError(
                f"max_state_bytes={self.max_state_bytes}: the state of {type(pl_module).__name__} takes {needed} bytes "
                f"{when}; give it less to keep (units, buffer_size, projections), or a larger limit."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what followed the last batch."""
        self._seconds += time.monotonic() - self._last

    def cost(self, pl_module: LightningModule) -> dict[str, float]:
        """All that was measured; see the class."""
        return {
            "samples_per_second": self._samples / self._seconds if self._seconds else 0.0,
            "state_bytes": state_bytes(pl_module),
            "peak_memory_bytes": _peak_bytes(pl_module.device),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"samples": self._samples, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._samples, self._seconds = state_dict["samples"], state_dict["seconds"]


def state_bytes(method: LightningModule) -> int:
    """Bytes of a method's state, without a frozen backbone."""
    backbone: Any = method.backbone
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    whole = len(trained) == len(list(backbone.parameters()))
    left_out = {f"backbone.{name}" for name in backbone.state_dict() if name not in trained and not (trained and whole)}
    state = method.state_dict()
    kept: list[Tensor] = [value for name, value in state.items() if name not in left_out]
    learnt_before: int = backbone.learnt_bytes
    return learnt_before + sum(value.numel() * value.element_size() for value in kept)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
