"""Keys that address memory units, and the counters that keep them in order."""

import math
import warnings
from abc import abstractmethod
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import functional
from mh_lightning.distributed import HEADER_BYTES, gather_in_turn, refuse_joining, world_size
from mh_lightning.errors import UserError, require
from mh_lightning.functional.autocast import without_autocast
from mh_lightning.layers.after_backward import after_backward
from mh_lightning.layers.auto_scale import AUTO, SHARPNESS, AutoScale, sigma_and_gamma
from mh_lightning.layers.matches import (
    Forward,
    Matched,
    MatchedOne,
    NormalisedKeys,
    as_batch,
    is_not_zero,
    nan_if_not_finite,
)
from mh_lightning.layers.psi import PSI_NAMES, psi
from mh_lightning.layers.wide_state import WideState, at_least_float32, require_whole

DISTANCES = ("cosine", "dot_scaled", "euclidean")
KEY_UPDATES = ("ad_hoc_WTA", "grad_WTA", "grad_not_WTA")
COUNTERS = ("mu", "eta", "key_counter", "scrambling_count")


class KeyMemory(WideState):
    """Key-addressed memory: matches samples with keys, and moves keys and counters after each backward pass.

    Subclasses hold the memory units, blend them by what `_attend` returns, call `_update_after_backward` with their
    output, and overwrite recycled units in `_recycle_memories`. `MHLinear` describes the options and attributes.

    In a process group, each update exchanges the rows that the ranks have matched, by one collective whose shape is
    that of the largest batch a rank has had: `bytes_sent` bytes a rank. All ranks then update alike, from the rows of
    all, in the order in which samples are dealt out to ranks in turn.
    """

    same_on_all_ranks = True  # buffers, see `mh_lightning.distributed.state_kept_alike`
    wide = ("K",)

    K: Tensor
    M: Tensor
    mu: Tensor
    eta: Tensor
    key_counter: Tensor
    scrambling_count: Tensor

    def __init__(
        self,
        key_sets: int,
        key_mem_units: int,
        key_size: int,
        *,
        psi_fn: str,
        delta: int,
        gamma_alpha: float | str,
        tau_alpha: float,
        tau_mu: int,
        tau_eta: int,
        upd_k: str | None,
        beta_k: float,
        scramble: bool,
        random_memories: bool,
        detach_gradients: bool,
        distance: str,
        sigma_eu: float | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.key_mem_units, self.key_size, self.psi_fn = key_mem_units, key_size, psi_fn
        self.delta, self.gamma_alpha = delta, gamma_alpha
        self.tau_alpha, self.tau_mu, self.tau_eta = tau_alpha, tau_mu, tau_eta
        self.upd_k = "grad_not_WTA" if upd_k is None else upd_k
        self.beta_k, self.scramble, self.random_memories = beta_k, scramble, random_memories
        self.detach_gradients, self.distance, self.sigma_eu = detach_gradients, distance, sigma_eu
        own = type(self).__name__
        for name, size in {"key_mem_units": key_mem_units, "key_size": key_size, "delta": delta}.items():
            require(f"{own}: {name}", size, at_least=1)
        require(f"{own}: sigma_eu", sigma_eu, above=0, below=math.inf, or_text=AUTO)
        require(f"{own}: gamma_alpha", gamma_alpha, above=-math.inf, below=math.inf, or_text=AUTO)
        require(f"{own}: beta_k", beta_k, above=-math.inf, below=math.inf)
        require(f"{own}: psi_fn", psi_fn, one_of=PSI_NAMES)
        require(f"{own}: distance", distance, one_of=DISTANCES)
        require(f"{own}: upd_k", self.upd_k, one_of=KEY_UPDATES)
        if delta > key_mem_units:
            warnings.warn(
                f"{type(self).__name__}: delta={delta} is more than key_mem_units={key_mem_units}; it is clamped.",
                stacklevel=3,
            )
            self.delta = key_mem_units
        wide = at_least_float32(dtype or torch.get_default_dtype())
        keys = torch.empty(key_sets, key_mem_units, key_size, device=device, dtype=wide)
        if self.upd_k == "ad_hoc_WTA":
            self.register_buffer("K", keys)
        else:
            self.K = nn.Parameter(keys)
        for name in COUNTERS[:3]:
            self.register_buffer(name, torch.zeros(key_sets, key_mem_units, dtype=torch.long, device=device))
        self.register_buffer("scrambling_count", torch.zeros(key_sets, dtype=torch.long, device=device))
        self.scale: AutoScale | None = None
        if distance == "euclidean" and gamma_alpha == AUTO:
            self.gamma_alpha = SHARPNESS
        if (sigma_eu if distance == "euclidean" else gamma_alpha) == AUTO:
            start = 2.0 if distance == "cosine" else 2 / 3  # of two initial keys, see `_reset_keys`
            self.scale = AutoScale(key_size, start, device=device, dtype=dtype)
        self._updates_at: Literal["backward", "call", "step"] = "backward"
        self._pending: list[Matched | MatchedOne] = []
        self._version_of_pending = 0
        self._gradient_of_pending: Tensor | bool = False  # whether M's was not all zero when they came
        self._recycled: int | Tensor = 0  # updates that recycled units, in this process

    @property
    def defer_key_updates(self) -> bool:
        """Whether updates are collected until `apply_key_updates` is called. To turn it off drops what waits."""
        return self._updates_at != "backward"

    @defer_key_updates.setter
    def defer_key_updates(self, value: bool) -> None:
        self._updates_at = "call" if value else "backward"
        if not value:
            self.drop_key_updates()

    def defer_key_updates_to_step(self) -> None:
        """Let an optimizer that calls `apply_key_updates` when it steps do so, unless the updates are deferred."""
        if self._updates_at == "backward":
            self._updates_at = "step"

    @property
    def key_updates_wait_for_step(self) -> bool:
        """Whether an optimizer is to call `apply_key_updates`."""
        return self._updates_at == "step"

    @property
    def gradients_are_gone(self) -> bool:
        """Whether the gradient of M that waiting updates came with was dropped since: set to None, or to zero.

        In a process group, zeros are not minded: all ranks must find the same, and each has seen its own gradients.
        """
        gradient = self.M.grad
        return gradient is None or (bool(self._gradient_of_pending) and not bool(is_not_zero(gradient)))

    def bytes_sent(self, rows: int) -> int:
        """Bytes that each rank sends in an update, if no rank has more than `rows` rows: 8 + rows · (w d + q (8 + w)),
        and 8 more a row with `random_memories`; w is 8 for float64, else 4.
        """
        width = self.K.dtype.itemsize
        row = width * self.key_size + len(self.K) * (8 + width) + 8 * self.random_memories
        return HEADER_BYTES + rows * row

    def _sigma_of_steps(self) -> float:
        """For the steps of the keys; 1/sqrt(d) makes them those that `MHLinear` describes for "auto"."""
        return 1 / math.sqrt(self.key_size) if isinstance(self.sigma_eu, str) else self.sigma_eu

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no optimizer that would step it."""
        state = dict(self.__dict__)
        if self.key_updates_wait_for_step:
            state |= {"_updates_at": "backward", "_pending": [], "_gradient_of_pending": False}
        return state

    @torch.no_grad()
    def _reset_keys(self) -> None:
        bound = 1 / math.sqrt(self.key_size)
        nn.init.uniform_(self.K, -bound, bound)
        if self.distance == "cosine":
            self.K.copy_(F.normalize(self.K, dim=2))
        for name in COUNTERS:
            getattr(self, name).fill_(self.tau_eta if name == "eta" else 0)
        if self.scale is not None:
            self.scale.reset()
        self.drop_key_updates()

    def _attend(self, x: Tensor) -> tuple[functional.Attention, Tensor]:
        keys_by_gradient = self.upd_k != "ad_hoc_WTA"
        if self.detach_gradients and not (self.distance == "cosine" and keys_by_gradient):
            x = x.detach()
        z, keys = psi(x.to(self.K.dtype), self.psi_fn, self.key_size), self.K
        if x.requires_grad and not keys_by_gradient and self.training:
            keys = keys.clone()  # they move, and the graph may be kept
        if self.distance == "cosine":
            z = functional.unit_length(z)
            if keys_by_gradient:
                keys = NormalisedKeys.apply(keys)
        sigma, gamma = sigma_and_gamma(self.sigma_eu, self.gamma_alpha, self.scale)
        return functional.attend(functional.match(z, keys, self.distance, sigma), self.delta, gamma), z

    def _update_after_backward(
        self, y: Tensor, attention: functional.Attention, z: Tensor, *, kept: bool, matched_is_all: bool
    ) -> None:
        """Update once `y` is back-propagated.

        Args:
            y: output, (*, o).
            attention: of its samples.
            z: what was matched, (b, d).
            kept: whether y's graph needs the memories as they are.
            matched_is_all: whether z is not finite where a sample is not.
        """
        refuse_joining(type(self).__name__)
        z = z.detach()
        if self._updates_at != "backward" and self.distance != "cosine":
            z = z.clone()  # what waits must not change with an input that the caller fills again
        responses = attention.responses[..., 0].detach()
        if not matched_is_all:
            responses = responses + nan_if_not_finite(y.detach(), responses)
        matched = Matched(self._this_forward(kept), z, attention.units[..., 0], responses)
        after_backward(y, self, lambda gradient: self._reached(matched, gradient), self._end_of_backward)

    def _attend_one(self, x: Tensor) -> tuple[functional.OneAttention, functional.Floats]:
        """As `_attend` for one sample (1, d) that is matched as it is; see `mh_lightning.functional.one_sample`."""
        z: functional.Floats = x.detach().numpy()[0]
        if self.distance == "cosine":
            z = z / max(math.sqrt(float(z @ z)), functional.EPSILON)
        keys, (sigma, gamma) = self.K.numpy()[0], sigma_and_gamma(self.sigma_eu, self.gamma_alpha, self.scale)
        return functional.attend_one(z, keys, self.distance, float(sigma), self.delta, float(gamma)), z

    def _update_one_after_backward(self, y: Tensor, attention: functional.OneAttention, z: functional.Floats) -> None:
        refuse_joining(type(self).__name__)
        z = z.copy() if self._updates_at != "backward" else z
        winner, response = int(attention.units[0]), float(attention.responses[0])
        matched = MatchedOne(self._this_forward(kept=False), z, winner, response)
        after_backward(y, self, lambda gradient: self._reached_one(matched, gradient), self._end_of_backward)

    def _this_forward(self, kept: bool) -> Forward:
        return Forward(self._updated_state(), self._recycled, kept)

    def _updated_state(self) -> list[Tensor | None]:
        """The tensors that an update changes, as far as they are this layer's own."""
        return [*self._buffers.values(), *(self._parameters.values() if self.scramble else ())]

    def _reached(self, matched: Matched, gradient: Tensor) -> Matched:
        """What a backward pass that reaches the output leaves to the update: no sample whose gradient is not finite."""
        self._check_pass(matched.forward)
        responses = matched.responses
        if gradient.device.type == "cpu" and math.isfinite(float(gradient.sum(dtype=responses.dtype))):
            return matched
        return matched._replace(responses=responses + nan_if_not_finite(gradient, responses))

    def _reached_one(self, matched: MatchedOne, gradient: Tensor) -> MatchedOne:
        self._check_pass(matched.forward)
        return matched if functional.is_finite(gradient.detach().numpy()) else matched._replace(response=math.nan)

    def refuse_passes_after_recycling(self, y: Tensor) -> None:
        """For outputs of layers whose units are recycled with this one's: a graph may need them as they are."""
        forward = self._this_forward(kept=True)
        y.register_hook(lambda _: self._check_pass(forward))  # type: ignore[no-untyped-call]

    def _check_pass(self, forward: Forward) -> None:
        name = type(self).__name__
        before, now = forward.recycled, self._recycled
        if forward.kept and before is not now and bool(before != now):
            raise UserError(
                f"{name}: scramble=True has recycled a unit between a forward and this backward pass through it; call "
                "backward once for all, or set defer_key_updates=True and call apply_key_updates() after the last."
            )
        if self._pending and self._updates_at == "step":
            if self.M._version != self._version_of_pending:
                raise UserError(
                    f"{name}: memory_head_optimizer moves the keys when it steps, but another optimizer has stepped "
                    "M; set defer_key_updates=False before it takes over."
                )
            if self.gradients_are_gone:
                self.drop_key_updates()

    def _require_own(self, state: list[Tensor | None]) -> None:
        """Refuse to move what is not, or no longer, this layer's own."""
        own, name = self._updated_state(), type(self).__name__
        if len(own) != len(state) or not all(map(is_, own, state)):
            require_whole(self)
            raise UserError(
                f"{name}: this forward has read tensors that were put in the place of its own "
                "(torch.func.functional_call), which it must not move; call it in eval mode."
            )
        if "K" not in self._buffers and "K" not in self._parameters:
            raise UserError(f"{name}: K is parametrized, or that of a replica, so it cannot be moved; use eval mode.")

    def _end_of_backward(self, collected: list[Matched | MatchedOne]) -> None:
        for matched in collected:
            self._require_own(matched.forward.state)
        if self._updates_at != "backward":
            self._pending += collected
            self._version_of_pending = self.M._version
            if self._updates_at == "step" and self.M.grad is not None and world_size() == 1:
                self._gradient_of_pending = is_not_zero(self.M.grad)
            return
        for matched in collected:
            self._update_from(matched)

    def apply_key_updates(self) -> None:
        """With `defer_key_updates`: update once for all forwards back-propagated since the last call, as if they had
        been one batch. To be called before each optimizer step, on all ranks.
        """
        pending = self._pending
        self.drop_key_updates()
        if len(pending) == 1:
            self._update_from(pending[0])
            return
        kept = any(one.forward.kept for one in pending)
        batches = [as_batch(matched) for matched in pending]
        empty = self.K.new_zeros(0, self.key_size)
        zero_sets = empty.new_zeros(0, self.K.shape[0])
        with without_autocast(self.K):
            self._update(
                torch.cat([empty, *(one.z.to(empty) for one in batches)]),
                torch.cat([zero_sets.long(), *(one.winners.to(empty.device) for one in batches)]),
                torch.cat([zero_sets, *(one.responses.to(empty) for one in batches)]),
                kept,
            )

    def _update_from(self, matched: Matched | MatchedOne) -> None:
        if isinstance(matched, MatchedOne) and world_size() == 1:
            self._update_one(matched)
        else:
            forward, z, winners, responses = as_batch(matched)
            with without_autocast(self.K):
                self._update(z.to(self.K), winners.to(self.K.device), responses.to(self.K), forward.kept)

    def drop_key_updates(self) -> None:
        """With `defer_key_updates`: forget what waits, for an optimizer step that is not taken."""
        self._pending, self._gradient_of_pending = [], False

    @torch.inference_mode()
    def _update(self, z: Tensor, winners: Tensor, responses: Tensor, kept: bool) -> None:
        """Scramble, move the keys and count, from the forward's z (b, d), winners and their responses (b, q).

        Where `_may_wait_for` forbids to look at values, what could be left out is computed and then masked.

        Args:
            z: what was matched.
            winners: best units.
            responses: of the winners.
            kept: whether a graph may need the memories as they are.
        """
        require_whole(self)
        seeds = []
        if self.random_memories:  # every rank draws, to keep the generators in step; the first row's draw is used
            seeds.append(torch.randint(2**31, (1,)).to(z.device).expand(len(z)))
        z, winners, responses, *seeds = gather_in_turn(z, winners, responses, *seeds)
        usable = None  # rows, where not all of them are known to be
        if not self._may_wait_for(z.device, kept):
            usable = functional.usable_rows(z, responses)
            z, responses = (rows.masked_fill(~usable.unsqueeze(1), 0) for rows in (z, responses))
        elif not functional.are_usable(z, responses):
            chosen = functional.usable_rows(z, responses)
            z, winners, responses = z[chosen], winners[chosen], responses[chosen]
        batch = z.shape[0]
        if batch == 0:
            return
        keys = self.K
        if self.distance == "cosine" and self.upd_k != "ad_hoc_WTA":
            keys = F.normalize(keys, dim=2)
        sigma, _ = sigma_and_gamma(self.sigma_eu, self.gamma_alpha, self.scale)
        won_by = winners.t()
        ones = torch.ones_like(won_by) if usable is None else usable.long().expand(len(keys), batch)
        self.key_counter.scatter_add_(1, won_by, ones)
        if self.scramble:
            known = responses if usable is None else responses.masked_fill(~usable.unsqueeze(1), math.inf)
            plan = functional.plan_scramble(
                known, self.mu, self.eta, tau_alpha=self.tau_alpha, tau_mu=self.tau_mu, tau_eta=self.tau_eta
            )
            self._recycle(keys, z, winners, plan, seeds, masked=usable is not None)
        if self.upd_k == "ad_hoc_WTA":
            width = self._sigma_of_steps()
            functional.move_keys_(
                keys, z, winners, responses, distance=self.distance, beta_k=self.beta_k, sigma_eu=width
            )
            if batch > 1 and self.scramble:
                # the same selection as in the forward, so that ties fall alike
                winners = functional.match(z, keys, self.distance, sigma).topk(self.delta, dim=2).indices[..., 0]
        if keys is not self.K:
            self.K.copy_(keys)
        if self.scramble:
            won = torch.zeros_like(self.mu).scatter_add_(1, winners.t(), ones)
            self.eta.masked_fill_(won > 0, 0)
            self.mu.add_(won)
            self.eta.add_(batch if usable is None else usable.sum())
        if self.scale is not None:
            self.scale.add(z, usable)

    def _recycle(
        self, keys: Tensor, z: Tensor, winners: Tensor, plan: functional.ScramblePlan, seeds: list[Tensor], masked: bool
    ) -> None:
        """Recycle the units of a plan.

        Args:
            keys: (q, m, d), changed.
            z: samples that became keys are among them, (b, d).
            winners: (b, q).
            plan: of all key sets.
            seeds: of random memories, if there are any.
            masked: write all sets' units, those that are not recycled as they are, without a look at the plan.
        """
        sets = torch.arange(len(keys), device=keys.device) if masked else plan.wanted.nonzero().flatten()
        if not len(sets):
            return
        units, samples = (plan.units, plan.samples) if masked else (plan.units[sets], plan.samples[sets])
        wanted = plan.wanted if masked else None
        self._recycle_memories(sets, units, winners[samples, sets], int(seeds[0][0]) if seeds else 0, wanted)
        new, used = z[samples], torch.zeros_like(self.mu[sets, units])
        if wanted is not None:
            new = torch.where(wanted.unsqueeze(1), new, keys[sets, units])
            used = torch.where(wanted, used, self.mu[sets, units])
        keys[sets, units], self.mu[sets, units] = new, used
        self.scrambling_count[sets] += 1 if wanted is None else wanted.long()
        self._recycled = self._recycled + (1 if wanted is None else wanted.any().long())

    def _may_wait_for(self, device: torch.device, kept: bool) -> bool:
        """Whether to look at values, for which a GPU has to be waited for.

        So it is where memories must not be written to without need, since a graph needs them as they are, and where
        the units' new weights are drawn on the CPU.
        """
        return device.type == "cpu" or (self.scramble and (kept or self.random_memories))

    def _update_one(self, matched: MatchedOne) -> None:
        """As `_update`, for one sample and one key set whose keys are moved ad hoc."""
        _, z, winner, response = matched
        seed = int(torch.randint(2**31, (1,))) if self.random_memories else 0
        if not functional.is_usable(z, response):
            return
        keys, mu, eta = self.K.numpy()[0], self.mu.numpy()[0], self.eta.numpy()[0]
        self.key_counter.numpy()[0, winner] += 1
        if self.scramble:
            unit = functional.unit_to_scramble(
                response, mu, eta, tau_alpha=self.tau_alpha, tau_mu=self.tau_mu, tau_eta=self.tau_eta
            )
            if unit is not None:
                with torch.inference_mode():
                    self._recycle_memories(torch.tensor([0]), torch.tensor([unit]), torch.tensor([winner]), seed)
                    self.scrambling_count += 1
                self._recycled += 1
                keys[unit], mu[unit] = z, 0
        width = self._sigma_of_steps()
        functional.move_key_(keys[winner], z, response, distance=self.distance, beta_k=self.beta_k, sigma_eu=width)
        if self.scramble:
            eta[winner] = 0
            mu[winner] += 1
            eta += 1
        if self.scale is not None:
            self.scale.add_one(z)

    @abstractmethod
    def _recycle_memories(
        self, sets: Tensor, units: Tensor, sources: Tensor, seed: int, wanted: Tensor | None = None
    ) -> None:
        """Overwrite unit `units[i]` of key set `sets[i]` with its `sources[i]`, or anew from the seed; all of them, or
        those that are `wanted`.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in ("K", "M")):
            self.drop_key_updates()
        if not self.scramble and f"{prefix}K" in state_dict:
            # the published code saves no counters without scrambling
            for name in COUNTERS:
                state_dict.setdefault(prefix + name, getattr(self, name))
        for name in COUNTERS:
            if prefix + name in state_dict:  # the published code counts in floats
                state_dict[prefix + name] = state_dict[prefix + name].long()
        super()._load_from_state_dict(state_dict, prefix, *args)
