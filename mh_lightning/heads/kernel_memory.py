"""A Memory Head whose memories are those of a kernel machine, solved in closed form."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mh_lightning.errors import UserError, require
from mh_lightning.functional.codes import FLOAT16, FLOAT64, ROUNDED, turn, turn_back
from mh_lightning.functional.kernel_ridge import (
    Penalty,
    best_kernel_regression,
    neighbourhood,
    responses,
    sums_of_all,
    with_samples_not_kept,
)
from mh_lightning.functional.normalization import NORMALIZATIONS, normalised
from mh_lightning.functional.ridge import Sums
from mh_lightning.heads.base import ClosedFormHead
from mh_lightning.heads.drawn_projection import seed_of_run
from mh_lightning.heads.packed_gram import PackedGram, numbers_of_gram
from mh_lightning.heads.sample_store import SampleStore, bytes_of_origin, bytes_of_sample
from mh_lightning.heads.temperature import PROBES, left_out

LARGEST_IN_FLOAT32 = 2.0**126
NO_SPREAD = 1e-7  # of the largest mean: what varies by less was lost when features were float32


class KernelMemoryUnits(ClosedFormHead):
    r"""Memory units that answer together: keys are landmarks of a kernel machine, memories its weights, in one pass.

    .. math::
        r_j(x) = \exp(-\|z - K_j\|^2 / w), \qquad o(x) = V^\top [z, 1] + \sum_j r_j(x) M_j

    with z the normalised features. V and M are a ridge regression to one-hot classes with the penalty
    :math:`\lambda (\rho \|V\|^2 + \mathrm{tr}\, M^\top K M)`, K the kernel matrix of the keys, and :math:`\lambda` from
    generalised cross-validation over the kept samples: Nyström's approximation of kernel ridge regression, with a
    linear part beside.

    Keys that come late would have no sums over the past. So no sums of responses are kept, but samples, within
    `max_bytes`, as codes of 4 bits a number if there are many: see `SampleStore`. When predictions are asked for, keys
    are drawn from them, and what is not kept takes part through exact sums of the linear part, see
    `mh_lightning.functional.kernel_ridge.with_samples_not_kept`. So neither the order of the samples nor that of the
    classes matters, but for which samples are drawn.

    Source: the layer is that of Tiezzi et al., "Memory Head for Pre-Trained Backbones in Continual Learning", CoLLAs
    2024, section 3, with attention to all units; the kernel machine is Williams and Seeger, "Using the Nyström Method
    to Speed Up Kernel Machines", NeurIPS 2000; that it learns a stream from codes is this project's, see
    ``docs/heads.md``.

    Args:
        num_features: n.
        num_classes: C.
        key_mem_units: m, at least 1; fewer while fewer samples are kept.
        max_bytes: at least 1, of the whole state: sums, codes and classes.
        width: w, at least 1e-6 and at most 1e6, in squared distances within which a tenth of the keys lie, see
            `mh_lightning.functional.kernel_ridge.neighbourhood`.
        linear_penalty: :math:`\rho`, at least 1e-12 and at most 1e12.
        linear_part: whether exact sums of the features are kept; by default, if they take at most half of `max_bytes`.
            Without, the linear part is the constant alone.
        normalization: of features x: "sqrt", ``sign(x) sqrt(|x|)`` over its length; "l2", ``x / ||x||``; "none", for
            points in a plane: x minus the mean of the kept samples, over the root of their mean variance. Such points
            are kept in float64.
        seed: in [0, 2**32), of which samples are kept and which are keys; by default torch's initial seed, which that
            of a run sets.

    Attributes:
        store: the samples, a `SampleStore`.
        gram: sum of [z, 1] [z, 1]ᵀ, a `PackedGram`, in float32, or float64 with the normalization "none".
        class_sums: sum of [z, 1] yᵀ, (d, C), of the same type.
        keys: K, (m, n), normalised features, of the samples so far; no rows before any.
        ridge: :math:`\lambda` of the last solution; 0 before any.
        state_bytes: bytes of the state.

    Raises:
        UserError: if options are out of range, or `max_bytes` has no room for a sample.

    Example:
        >>> head = KernelMemoryUnits(1, 2, normalization="none", seed=0)
        >>> x = torch.linspace(0, 3, 301).unsqueeze(1)
        >>> head.update(x, x.squeeze(1).long() % 2)  # which no linear map can tell
        >>> head(torch.tensor([[0.5], [1.5], [2.5]])).argmax(dim=1)
        tensor([0, 1, 0])
    """

    keeps_samples: ClassVar[bool] = True
    answers_with: ClassVar[tuple[str, ...] | None] = ()
    class_sums: Tensor
    signs: Tensor
    seed: Tensor
    ridge: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        key_mem_units: int = 1000,
        max_bytes: int = 10_000_000,
        width: float = 1.4,
        linear_penalty: float = 1.0,
        linear_part: bool | None = None,
        normalization: str = "sqrt",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, num_classes)
        require("key_mem_units", key_mem_units, at_least=1, whole=True)
        require("width", width, at_least=1e-6, at_most=1e6)
        require("linear_penalty", linear_penalty, at_least=1e-12, at_most=1e12)
        require("max_bytes", max_bytes, at_least=1, below=float("inf"))
        max_bytes = self.max_bytes = int(max_bytes)
        require("normalization", normalization, one_of=NORMALIZATIONS)
        self.key_mem_units, self.width, self.linear_penalty = key_mem_units, width, linear_penalty
        self.normalization = normalization
        self.largest = LARGEST_IN_FLOAT32 / num_features
        as_it_is = normalization == "none"
        number = torch.float64 if as_it_is else torch.float32
        bits = (FLOAT64,) if as_it_is else (FLOAT16, *ROUNDED)
        linear_bytes = bytes_of_linear_sums(num_features + 1, num_classes, number)
        self.linear_part = linear_bytes <= max_bytes / 2 if linear_part is None else linear_part
        size = num_features + 1 if self.linear_part else 1
        left = self._bytes_of_store(size, number)
        sample, origin = bytes_of_sample(num_features, bits[-1]), bytes_of_origin(num_features, bits[-1])
        if left < sample + origin:
            without = "" if not self.linear_part else ", or linear_part=false would do without the first"
            raise UserError(
                f"max_bytes={max_bytes}: sums of {size} linear features need {max_bytes - left} bytes and the first "
                f"sample {sample + origin}; {max_bytes - left + origin + 1000 * sample} would hold 1,000 samples"
                f"{without}."
            )
        self.gram = PackedGram(size, number)
        self.register_buffer("class_sums", torch.zeros(size, num_classes, dtype=number))
        self.store = SampleStore(num_features, left, bits)
        seed = seed_of_run(seed)
        drawn = torch.randint(2, (num_features,), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.register_buffer("signs", (2 * drawn - 1).to(self.counts.device, torch.int8))
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("ridge", torch.tensor(0.0, dtype=torch.float64))
        self.state_bytes = max_bytes
        self.register_load_state_dict_post_hook(_check_store)  # type: ignore[no-untyped-call]

    def _bytes_of_store(self, size: int, number: torch.dtype) -> int:
        return self.max_bytes - bytes_of_linear_sums(size, self.num_classes, number)

    # --- learning

    def grow(self, num_classes: int) -> None:
        """Make room for more classes, whose sums take some of the bytes of the samples; see `ClosedFormHead.grow`. The
        samples that are kept then are drawn from those before.
        """
        super().grow(num_classes)
        left = self._bytes_of_store(self.class_sums.shape[0], self.class_sums.dtype)
        self.store = self.store.resized(left, int(self.seed))

    def accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Add features (b, n) of classes (b,)."""
        z = self._stored_form(features)
        linear = self._linear(z)
        self.gram.add(linear)
        self.class_sums.T.index_add_(0, targets, linear)
        self.store.add(z, targets, int(self.seed))

    def _stored_form(self, features: Tensor) -> Tensor:
        """Features (b, n) as they are summed and kept: normalised and turned, unless they are kept as they are."""
        z = normalised(features.to(self.class_sums.dtype), self.normalization)
        return z if self.normalization == "none" else turn(z, self.signs)

    def _linear(self, z: Tensor) -> Tensor:
        """[z, 1], or 1, of z (b, n): (b, d)."""
        return F.pad(z, (0, 1), value=1.0) if self.linear_part else torch.ones_like(z[:, :1])

    # --- solving

    def solve(self) -> tuple[Tensor, ...]:
        """What `logits` needs: keys and linear weights side by side (n, m + C), the constant (C,), memories (m, C), the
        width that exponents are divided by (), origin (n,) and length () that features are standardised by; and for the
        temperature, what some kept samples would be answered had they not been learnt (p, C), and their classes (p,).
        """
        z, classes = self.store.kept()
        origin, length = self._standardisation(z)
        z = ((z - origin) / length).to(self.class_sums.dtype)
        targets = F.one_hot(classes, self.num_classes).to(z)
        order = self._shuffled(len(z))
        keys = z[order[: self.key_mem_units]]
        probes = order.flip(0)[:PROBES]  # keys last: no other sample is as near to a key
        width = self.width * neighbourhood(keys)
        linear, response = self._linear(z), responses(z, keys, width)
        if len(z) == int(self.counts.sum()) and not self.store.rounds:
            imputed = sums_of_all(linear, response, targets)
        else:
            imputed = with_samples_not_kept(self._linear_sums(origin, length), linear, response, targets)
        penalty = Penalty.of(linear.shape[1], self.linear_penalty, responses(keys, keys, width))
        samples, kept = float(self.counts.sum()), float(len(z))
        asked = torch.cat([linear[probes], response[probes]], dim=1).double()
        weights, ridge, leverage = best_kernel_regression(imputed, penalty, samples, kept, asked, z.dtype)
        self.ridge.fill_(ridge)
        answers = left_out(asked @ weights, targets[probes], leverage), classes[probes]
        on_z, constant, memories = weights.tensor_split([linear.shape[1] - 1, linear.shape[1]])
        if not len(on_z):
            on_z = z.new_zeros(self.num_features, self.num_classes)
        if self.normalization != "none":
            keys, on_z = turn_back(keys, self.signs), turn_back(on_z.T, self.signs).T
        products = torch.cat([keys.T, on_z], dim=1)
        found = (products, constant.squeeze(0), memories, products.new_tensor(width), origin, length)
        return *(part.to(self.class_sums.dtype) for part in found), *answers

    def _shuffled(self, kept: int) -> Tensor:
        """The kept samples in the order in which they become keys."""
        generator = torch.Generator("cpu").manual_seed(int(self.seed))
        return torch.randperm(kept, generator=generator, device="cpu").to(self.counts.device)

    def _standardisation(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Origin (n,) and length () of kept samples (N, n): 0 and 1, unless they are kept as they are."""
        if self.normalization != "none":
            return z.new_zeros(self.num_features), z.new_ones(())
        origin = z.mean(dim=0)
        length, scale = (z - origin).square().mean().sqrt(), origin.abs().amax()
        return origin, torch.where(length > NO_SPREAD * scale, length, torch.where(scale > 0, scale, 1.0))

    def _linear_sums(self, origin: Tensor, length: Tensor) -> Sums:
        """Of [(z - origin) / length, 1]."""
        gram, products = self.gram.whole(), self.class_sums.double()
        if self.normalization != "none":
            return Sums(gram, products)
        standard = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        standard[:-1] /= length
        standard[:-1, -1] = -origin[: len(gram) - 1] / length
        return Sums(standard @ gram @ standard.T, standard @ products)

    # --- answers

    def answers_left_out(self, *solution: Tensor) -> tuple[Tensor, Tensor]:
        """Answers (p, C) to some kept samples, had they not been learnt, and their classes (p,)."""
        return solution[6], solution[7]

    @property
    def keys(self) -> Tensor:
        """K, (m, n): solves, if there are samples that the solution does not know."""
        self.ensure_solved()
        if self._solution is None:
            return self.class_sums.new_zeros(0, self.num_features)
        products, _, memories, _, origin, length = self._solution[:6]
        return products[:, : len(memories)].T * length + origin

    def logits(self, features: Tensor, *solution: Tensor) -> Tensor:
        """Regressions (b, C)."""
        products, constant, memories, width, origin, length = solution[:6]
        z = (normalised(features.to(products.dtype), self.normalization) - origin) / length
        near, linear = (z @ products).tensor_split([len(memories)], dim=1)
        keys = products[:, : len(memories)]
        squared = z.square().sum(dim=1, keepdim=True) + keys.square().sum(dim=0) - 2 * near
        return constant + linear + torch.exp(-squared.clamp_min(0) / width) @ memories


def bytes_of_linear_sums(size: int, num_classes: int, number: torch.dtype) -> int:
    """Bytes of the packed Gram matrix (d, d) and of class sums (d, C).

    Example:
        >>> bytes_of_linear_sums(1281, 10, torch.float32)
        3660844
    """
    return number.itemsize * (numbers_of_gram(size) + size * num_classes)


def _check_store(head: KernelMemoryUnits, keys: object) -> None:
    head.store.check(head.num_classes)
