"""The Memory Head layer."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from mh_lightning import functional
from mh_lightning.distributed import in_process_group
from mh_lightning.errors import UserError, require
from mh_lightning.functional.autocast import autocast_dtype, without_autocast
from mh_lightning.layers.key_memory import COUNTERS, KeyMemory
from mh_lightning.layers.psi import resized_shape

MEMORY_UPDATES = ("WTA", "vanilla")
DELTA, PUBLISHED_DELTA = 5, 3  # or all units, if there are fewer
PUBLISHED: dict[str, Any] = {  # defaults of the published code
    "key_mem_units": 2,
    "distance": "cosine",
    "sigma_eu": 1.0,
    "gamma_alpha": 0.1,
    "upd_m": None,
    "upd_k": None,
    "beta_k": 0.001,
    "scramble": False,
    "tau_alpha": 0.5,
    "tau_mu": 100,
    "tau_eta": 100,
}


class MHLinear(KeyMemory):
    r"""Linear layer whose weights are blended, for each sample, from key-addressed memory units.

    A sample x is mapped to key space, :math:`z = \psi(x)`, and matched with the keys of m memory units; the best
    `delta` are blended into its weights:

    .. math:: y = \sum_j \alpha_j M_j x + \mathrm{bias}, \qquad \alpha = \mathrm{softmax}(\gamma\,r(z, K))

    Memories learn by gradient. Keys learn by gradient or, with ``upd_k="ad_hoc_WTA"``, by online k-means; with
    `scramble`, units that are old and little used are recycled for samples that no key knows. Keys and counters change
    once for each training forward that is back-propagated, at the end of the backward pass: the training loop is that
    of `nn.Linear`. Evaluation and ``torch.no_grad()`` forwards change nothing, and neither do those of a layer whose
    memories are frozen (``layer.M.requires_grad_(False)``).

    Samples that are not finite (their numbers, their squares, their outputs' gradients) move nothing and count nothing:
    keys, counters, scrambling and the automatic scale are as if they had not been in the batch. Whether an optimizer
    then takes its step cannot be known at the end of a backward pass: where a loop skips steps (``GradScaler``,
    ``clip_grad_norm_(..., error_if_nonfinite=True)``), use `mh_lightning.memory_head_optimizer`, which moves keys when
    it steps, or set `defer_key_updates` and call `apply_key_updates` before each step that is taken and
    `drop_key_updates` in place of one that is not. Methods under the trainer do so. Updates that wait are like
    gradients: copies take them along, no state dict holds them, and loading, resetting and turning deferral off drop
    them; a run that is resumed from before a step takes them again from its samples.

    Keys and the automatic scale are float32 or wider, whatever the module is cast to: in half precision their small
    steps would be rounded away.

    A graph may be kept and passed again (``retain_graph``), unless a unit that it needs was recycled since. The layer
    may be used more than once within reentrant checkpoints, if these are not nested. ``torch.func.functional_call`` and
    parametrizations work as long as no update would move what is not the layer's own (in evaluation, and for M without
    `scramble`); transforms of ``torch.func`` (vmap, grad, ...) are refused.

    With ``sigma_eu="auto"`` (euclidean), :math:`\sigma = S / (10 \sqrt d)`, where S estimates the mean squared distance
    between two training samples in key space: responses are :math:`\exp(-10\,\|z - K_j\|^2 / S)`, and ad-hoc keys move
    by :math:`\beta\,r\,(z - K_w)`, whatever the features' scale. With ``gamma_alpha="auto"``, :math:`\gamma` is 25 over
    the responses' range: 25 if euclidean, else :math:`50 \sqrt d / S`. S moves with the keys, is
    saved in the state and described in `mh_lightning.layers.auto_scale`; before the first step it is that of the keys.

    Args:
        in_features: n.
        out_features: o.
        bias: whether each unit holds a bias.
        shared_keys: one key set for all outputs; otherwise each output has its own keys and units.
        key_mem_units: memory units m a key set, at least 1. Defaults are those that serve features of any scale,
            chosen on validation samples; those of the published code are in `published`.
        psi_fn: "identity", "sign", "resize1d", "resize2d" or "resize2d_sign"; see `mh_lightning.layers.psi.psi`.
        key_size: d, by default n.
        layer_norm: normalise the input, with a gain and an offset of its own for each unit.
        delta: units blended for a sample, at least 1, by default 5; more than `key_mem_units` is clamped, with a
            warning if it was asked for.
        gamma_alpha: inverse temperature of the attention, or "auto", see below.
        tau_alpha: winner's response below which a sample may scramble a unit.
        tau_mu: usage, in samples, below which a unit may be scrambled.
        tau_eta: age, in samples, from which a unit may be scrambled; also the age at the start.
        upd_m: "WTA" (only the winner's memory learns) or "vanilla" (all selected ones; also None).
        upd_k: "ad_hoc_WTA", "grad_WTA" or "grad_not_WTA" (also None).
        beta_k: step of the ad-hoc key update.
        scramble: recycle weak units.
        random_memories: a recycled unit starts from fresh random weights instead of the winner's.
        detach_gradients: no gradient reaches x through the match (it always does with cosine and gradient keys).
        distance: "cosine", "dot_scaled" or "euclidean".
        sigma_eu: width of the euclidean response, above 0, in units of squared distance over sqrt(d), or "auto", see
            below.
        key_features: length of a separate input that is matched in place of x, see `forward`; by default x itself is.
        normalize_input: divide x, and a separate input, by its length before all else.

    Attributes:
        K: keys, (q, m, d) with q = 1 for shared keys, else o: a buffer with ad-hoc keys, else a parameter.
        M: memory units, (q, m, u). Shared: o rows of n weights and a bias, then with `layer_norm` n gains and n
            offsets; private: one such row.
        mu, eta: usage and age of each unit, in samples, (q, m), integer; they move only with `scramble`.
        key_counter: training samples won by each unit, (q, m), integer.
        scrambling_count: units recycled, (q,), integer.
        scale: the `AutoScale` of a layer with "auto", else None.
        followers: layers with memory units of their own, in which units are recycled when they are here.
        defer_key_updates: collect the updates until `apply_key_updates` is called; off by default, on after
            `memory_head_optimizer`, which then calls it.
        sparse_gradients: where it costs less, M's gradient is a sparse tensor of the units that have one;
            `memory_head_optimizer` turns it on; turn it off before another optimizer takes over. Off by default, and
            without effect in a process group or with `layer_norm`.

    Shape:
        Input (*, n), or (b, ...) with n numbers a sample, or (b, channels, height, width) for resize2d.
        Output (*, o) or (b, o).

    Raises:
        UserError: on contradictory options or an input of the wrong width; from a backward pass that cannot be right,
            see above.

    Source: Tiezzi et al., CoLLAs 2024, section 3.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), MHLinear(8, 3, key_mem_units=5, delta=2))
        >>> net(torch.randn(16, 4)).shape
        torch.Size([16, 3])
    """

    M: nn.Parameter
    sparse_gradients = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        shared_keys: bool = True,
        key_mem_units: int = 100,
        psi_fn: str = "identity",
        key_size: int | None = None,
        layer_norm: bool = False,
        delta: int | None = None,
        gamma_alpha: float | str = "auto",
        tau_alpha: float = 0.65,
        tau_mu: int = 10,
        tau_eta: int = 100,
        upd_m: str | None = "WTA",
        upd_k: str | None = "ad_hoc_WTA",
        beta_k: float = 0.003,
        scramble: bool = True,
        random_memories: bool = False,
        detach_gradients: bool = True,
        distance: str = "euclidean",
        sigma_eu: float | str = "auto",
        key_features: int | None = None,
        normalize_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        matched = in_features if key_features is None else key_features
        sizes = {"in_features": in_features, "out_features": out_features, "key_features": matched}
        for name, size in sizes.items():
            require(f"{type(self).__name__}: {name}", size, at_least=1)
        super().__init__(
            1 if shared_keys else out_features,
            key_mem_units,
            matched if key_size is None else key_size,
            psi_fn=psi_fn,
            delta=min(DELTA, key_mem_units) if delta is None else delta,
            gamma_alpha=gamma_alpha,
            tau_alpha=tau_alpha,
            tau_mu=tau_mu,
            tau_eta=tau_eta,
            upd_k=upd_k,
            beta_k=beta_k,
            scramble=scramble,
            random_memories=random_memories,
            detach_gradients=detach_gradients,
            distance=distance,
            sigma_eu=sigma_eu,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.shared_keys, self.layer_norm, self.key_features = shared_keys, layer_norm, key_features
        self.normalize_input = normalize_input
        self.followers: list[Any] = []
        self.upd_m = "vanilla" if upd_m is None else upd_m
        self._check_options()
        self.unit_outputs = out_features if shared_keys else 1
        unit_size = self.unit_outputs * (in_features + bias) + 2 * in_features * layer_norm
        self.M = nn.Parameter(torch.empty(*self.K.shape[:2], unit_size, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def published(cls, in_features: int, out_features: int, bias: bool = True, **options: Any) -> Self:
        """The layer with the defaults of the published code, for options that are not given: two units, cosine, keys
        and memories by gradient, no recycling.

        Args:
            in_features: n.
            out_features: o.
            bias: whether each unit holds a bias.
            options: of `MHLinear`.

        Source: Tiezzi et al., CoLLAs 2024, and its code.

        Example:
            >>> layer = MHLinear.published(8, 3)
            >>> layer.key_mem_units, layer.delta, layer.distance, layer.upd_k
            (2, 2, 'cosine', 'grad_not_WTA')
        """
        options = {**PUBLISHED, **options}
        delta = min(PUBLISHED_DELTA, options["key_mem_units"])
        return cls(in_features, out_features, bias, **{"delta": delta, **options})

    def _check_options(self) -> None:
        require("MHLinear: upd_m", self.upd_m, one_of=MEMORY_UPDATES)
        if self.upd_m == "WTA" and self.upd_k == "grad_not_WTA":
            raise UserError("MHLinear: upd_m='WTA' needs upd_k='ad_hoc_WTA' or 'grad_WTA', got 'grad_not_WTA'.")
        option, matched = ("in_features", self.in_features)
        if self.key_features is not None:
            option, matched = ("key_features", self.key_features)
        if self.psi_fn in ("identity", "sign") and self.key_size != matched:
            raise UserError(
                f"MHLinear: psi_fn={self.psi_fn!r} needs key_size={matched} ({option}), got "
                f"{self.key_size}; psi_fn='resize1d' can change the size."
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw memories and keys anew and forget the counters."""
        for memories in (self.M, *(layer.M for layer in self.followers)):
            fill_with_random_memories(memories)
        self._reset_keys()

    @torch.no_grad()
    def add_outputs(self, count: int) -> None:
        """Make room for more outputs, which start like those of a new layer; the others stay as they are.

        With shared keys, all units get new rows; otherwise the new outputs have keys and units of their own.

        Args:
            count: of new outputs, at least 1.

        Raises:
            UserError: if units are recycled with those of other layers.
        """
        require("MHLinear: count", count, at_least=1, whole=True)
        if self.followers:
            raise UserError("MHLinear: a layer whose units are recycled with those of others cannot get more outputs.")
        self.out_features += count
        if self.shared_keys:
            rows = self.unit_outputs * (self.in_features + self.bias)
            before, after = self.M[..., :rows], self.M[..., rows:]
            size = self.M.shape[2] + count * (self.in_features + self.bias)
            new = self.M.new_empty(*self.M.shape[:2], size - self.M.shape[2])
            nn.init.uniform_(new, -1 / math.sqrt(size), 1 / math.sqrt(size))
            self.M = nn.Parameter(torch.cat([before, new, after], dim=2), self.M.requires_grad)
            self.unit_outputs = self.out_features
            return
        keys = torch.empty_like(self.K[:1]).expand(count, -1, -1).clone()
        bound = 1 / math.sqrt(self.key_size)
        keys = nn.init.uniform_(keys, -bound, bound)
        keys = nn.functional.normalize(keys, dim=2) if self.distance == "cosine" else keys
        units = fill_with_random_memories(self.M.new_empty(count, *self.M.shape[1:]))
        for name, new in (("K", keys), ("M", units)):
            old = getattr(self, name)
            grown = torch.cat([old.detach(), new])
            setattr(self, name, nn.Parameter(grown, old.requires_grad) if isinstance(old, nn.Parameter) else grown)
        for name in COUNTERS:
            old = getattr(self, name)
            start = self.tau_eta if name == "eta" else 0
            setattr(self, name, torch.cat([old, torch.full_like(old[:1], start).expand(count, *old.shape[1:])]))

    def forward(self, x: Tensor, key_input: Tensor | None = None) -> Tensor:
        """Map (..., n) to (..., o); see the class. A layer with `key_features` matches `key_input` (..., f)."""
        if key_input is not None or not self._serves_one(x):
            return self.forward_with_attention(x, key_input)[0]
        if self.normalize_input:
            x = functional.unit_length(x)
        attention, z = self._attend_one(x)
        y = functional.blend_one(x, self.M, attention, self.bias, self.upd_m == "WTA")
        if self.training and y.requires_grad and self.M.requires_grad:
            self._update_one_after_backward(y, attention, z)
        return y

    def _serves_one(self, x: Tensor) -> bool:
        """Whether x is one sample and this layer so plain and small that NumPy is faster than torch."""
        return (
            functional.is_one_sample(x, self.M)
            and x.shape[1] == self.in_features
            and self.upd_k == "ad_hoc_WTA"
            and self.psi_fn == "identity"
            and self.detach_gradients
            and self.key_features is None
            and not self.layer_norm
            and autocast_dtype(x) is None
        )

    def forward_with_attention(self, x: Tensor, key_input: Tensor | None = None) -> tuple[Tensor, functional.Attention]:
        """As `forward`, with what each sample attends to."""
        if functional.in_function_transform():
            raise UserError(
                "MHLinear: transforms of torch.func (vmap, grad, jvp, ...) cannot pass through it; loop over the "
                "samples with torch.autograd.grad instead."
            )
        images, rows, batch_shape = self._arrange(x)
        if self.key_features is not None or key_input is not None:
            images = self._arrange_key_input(key_input, batch_shape)
        if self.normalize_input:
            images, rows = _of_unit_length(images), _of_unit_length(rows)
        lower = autocast_dtype(x)
        with without_autocast(x):
            attention, z = self._attend(images)
            if self.upd_m == "WTA" and self.upd_k == "grad_WTA":
                alphas = torch.cat([attention.alphas[..., :1], attention.alphas[..., 1:].detach()], dim=2)
                attention = functional.Attention(attention.responses, attention.units, alphas)
            y = self._blend(rows, attention, lower)
        if batch_shape != y.shape[:1]:
            y = y.view(*batch_shape, self.out_features)
            if y.requires_grad:
                y = y.clone()  # no view, so that it can be changed in place, as an output of nn.Linear can
        if self.training and y.requires_grad and self.M.requires_grad:
            kept = x.requires_grad or images.requires_grad or self.layer_norm
            matched_is_all = self.psi_fn == "identity" and self.key_features is None
            self._update_after_backward(y, attention, z, kept=kept, matched_is_all=matched_is_all)
        return y, attention

    def _arrange(self, x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """The input of psi, the input of the units (b, n), and the shape of the batch."""
        n = self.in_features
        if self.psi_fn.startswith("resize2d"):
            if x.dim() != 4 or math.prod(x.shape[1:]) != n:
                raise UserError(
                    f"MHLinear: psi_fn={self.psi_fn!r} needs images (b, channels, height, width) of "
                    f"in_features={n} numbers, got {tuple(x.shape)}."
                )
            if min(resized_shape(x.shape[1], x.shape[2], x.shape[3], self.key_size)) < 1:
                raise UserError(
                    f"MHLinear: key_size={self.key_size} is too small to resize images of shape "
                    f"{tuple(x.shape[1:])}; take at least 4 numbers a channel."
                )
            return x, x.flatten(1), x.shape[:1]
        if x.dim() > 0 and x.shape[-1] == n:
            rows = x.reshape(-1, n)
            return rows, rows, x.shape[:-1]
        if x.dim() > 2 and math.prod(x.shape[1:]) == n:
            rows = x.flatten(1)
            return rows, rows, x.shape[:1]
        raise UserError(
            f"MHLinear: in_features={n} numbers a sample are needed, got an input of shape {tuple(x.shape)}."
        )

    def _arrange_key_input(self, key_input: Tensor | None, batch_shape: torch.Size) -> Tensor:
        if self.key_features is None:
            raise UserError("MHLinear: a key_input was given, but not how long it is; set key_features.")
        if key_input is None or key_input.shape != (*batch_shape, self.key_features):
            raise UserError(
                f"MHLinear: key_features={self.key_features} needs a key_input of shape "
                f"{(*batch_shape, self.key_features)}, got {None if key_input is None else tuple(key_input.shape)}."
            )
        return key_input.reshape(-1, self.key_features)

    def _blend(self, x: Tensor, attention: functional.Attention, lower: torch.dtype | None) -> Tensor:
        n, q = self.in_features, self.M.shape[0]
        winner_only = self.upd_m == "WTA"
        memories: Tensor = self.M
        if lower is not None:
            x = x.to(memories.dtype)
        elif x.dtype != memories.dtype:
            raise UserError(
                f"MHLinear: the input is {x.dtype}, the memories are {memories.dtype}; convert one with .to(dtype)."
            )
        if self.layer_norm:
            # (g W) x + b + (g W) f = W (g (x + f)) + b, so the blended gain and offset move to the input
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5)
            memories, *vectors = torch.split(memories, [memories.shape[2] - 2 * n, n, n], dim=2)
            gain, offset = (functional.blend_vectors(part, attention, winner_only) for part in vectors)
            x = gain * (x.unsqueeze(1) + offset)
            x = x.squeeze(1) if q == 1 else x
        if lower is not None:
            x = x.to(lower)
        # DistributedDataParallel reduces dense gradients
        sparse = self.sparse_gradients and not self.layer_norm and not in_process_group()
        return functional.blend(x, memories, attention, bias=self.bias, winner_only=winner_only, sparse=sparse)

    def _recycle_memories(
        self, sets: Tensor, units: Tensor, sources: Tensor, seed: int, wanted: Tensor | None = None
    ) -> None:
        for memories in (self.M, *(layer.M for layer in self.followers)):
            if not isinstance(memories, nn.Parameter):
                raise UserError("MHLinear: M is parametrized, so its units cannot be recycled; set scramble=False.")
            if self.random_memories:
                generator = torch.Generator().manual_seed(seed)
                fresh = fill_with_random_memories(torch.empty(memories[:, 0].shape), generator).to(memories)
                memories[sets, units] = fresh[sets]
            else:
                new = memories[sets, sources]
                if wanted is not None:
                    new = torch.where(wanted.unsqueeze(1), new, memories[sets, units])
                memories[sets, units] = new

    def reference_state_dict(self) -> dict[str, Tensor]:
        """The state in the form of the published code: counters only with `scramble`, and mostly as floats."""
        state = {"K": self.K.detach().clone(), "M": self.M.detach().clone()}
        if self.scramble:
            state |= {name: getattr(self, name).float() for name in COUNTERS[:3]}
            state["scrambling_count"] = self.scrambling_count.clone()
        return state

    def extra_repr(self) -> str:
        """The options that shape the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias}, "
            f"key_mem_units={self.key_mem_units}, delta={self.delta}, shared_keys={self.shared_keys}, "
            f"distance={self.distance}, upd_m={self.upd_m}, upd_k={self.upd_k}, scramble={self.scramble}"
        )


def _of_unit_length(x: Tensor) -> Tensor:
    """Each sample (b, ...) divided by its length."""
    wide = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return functional.unit_length(wide).to(x.dtype).view(x.shape)


def fill_with_random_memories(memories: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Units (..., u) from U(-1/sqrt(u), 1/sqrt(u)), in place."""
    bound = 1 / math.sqrt(memories.shape[-1])
    return nn.init.uniform_(memories, -bound, bound, generator=generator)
