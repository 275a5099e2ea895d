"""Whether all ranks hold the same model."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mh_lightning.distributed import gather_rows, world_size
from mh_lightning.errors import UserError, require

CHUNK = 2**20  # numbers at a time, so that no copy of a large tensor is made
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MULTIPLIER = 2654435761  # spreads the weights, which are odd, so that no bit is lost modulo 2**64


class RankConsistency(Callback):
    """Stops a run as soon as its ranks do not hold the same parameters and buffers, bit for bit.

    After a step, each rank sends a checksum of 8 bytes for each tensor of the model's state to the others. With one
    process there is nothing to do.

    Args:
        every_n_steps: optimizer steps, at least 1, between two checks.

    Raises:
        UserError: names the first tensor that differs, and on which ranks; or if `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        require("RankConsistency: every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self._checked = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare, where an optimizer step has come since."""
        if world_size() == 1 or trainer.global_step < self._checked + self.every_n_steps:
            return
        self._checked = trainer.global_step
        state = pl_module.state_dict()
        own = torch.stack([checksum(value).to(pl_module.device) for value in state.values()])
        (sums,) = gather_rows(own.unsqueeze(0))
        ranks = torch.arange(len(sums), device=sums.device)
        same = sums == sums[0]
        for name, on_rank in zip(state, same.T, strict=True):
            if not bool(on_rank.all()):
                raise UserError(
                    f"RankConsistency: after step {trainer.global_step}, {name!r} on rank {ranks[~on_rank].tolist()} "
                    "differs from that on rank 0; what changes it must be the same on all ranks."
                )


def checksum(tensor: Tensor) -> Tensor:
    """An integer, (), that depends on each bit of a tensor and on its place.

    Example:
        >>> one = torch.tensor([1.0, 2.0])
        >>> bool(checksum(one) == checksum(one.clone())), bool(checksum(one) == checksum(one.flip(0)))
        (True, False)
    """
    bits = tensor.detach().contiguous().flatten()
    if bits.is_complex():
        bits = torch.view_as_real(bits).flatten()
    bits = bits.view(BITS[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for place, part in enumerate(torch.split(bits, CHUNK)):
        weights = torch.arange(place * CHUNK + 1, place * CHUNK + 1 + len(part), device=bits.device)
        total += (part.long() * (weights * MULTIPLIER | 1)).sum()
    return total
