"""The Memory Head, sample by sample: a slow, literal reading of its definition that the tests compare the layer with.

Nothing here is shared with the package. Samples, key sets and units are plain loops; each sample builds its own blended
weights. Autograd only differentiates the result.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Seen:
    """What one forward saw: a list over samples, then over key sets."""

    z: list[Tensor] = field(default_factory=list)
    winners: list[list[int]] = field(default_factory=list)
    responses: list[list[float]] = field(default_factory=list)


@dataclass
class Oracle:
    """Options have the names and defaults of `MHLinear`'s constructor. `margin` is the narrowest decision so far: below
    rounding error, the order of ties is nobody's promise."""

    K: Tensor
    M: Tensor
    in_features: int
    out_features: int
    bias: bool = True
    shared_keys: bool = True
    key_mem_units: int = 2
    psi_fn: str = "identity"
    key_size: int | None = None
    layer_norm: bool = False
    delta: int = 3
    gamma_alpha: float = 0.1
    tau_alpha: float = 0.5
    tau_mu: int = 100
    tau_eta: int = 100
    upd_m: str | None = None
    upd_k: str | None = None
    beta_k: float = 0.001
    scramble: bool = False
    detach_gradients: bool = True
    distance: str = "cosine"
    sigma_eu: float = 1.0

    def __post_init__(self) -> None:
        self.ad_hoc = self.upd_k == "ad_hoc_WTA"
        self.key_sets = 1 if self.shared_keys else self.out_features
        self.d = self.in_features if self.key_size is None else self.key_size
        self.K = self.K.detach().clone().requires_grad_(not self.ad_hoc)
        self.M = self.M.detach().clone().requires_grad_()
        self.mu = [[0] * self.key_mem_units for _ in range(self.key_sets)]
        self.eta = [[self.tau_eta] * self.key_mem_units for _ in range(self.key_sets)]
        self.key_counter = [[0] * self.key_mem_units for _ in range(self.key_sets)]
        self.scrambling_count = [0] * self.key_sets
        self.margin = math.inf

    def forward(self, x: Tensor) -> tuple[Tensor, Seen]:
        """Outputs (b, o), and what `update` needs."""
        if self.distance == "cosine" and not self.ad_hoc:
            for s in range(self.key_sets):
                for j in range(self.key_mem_units):
                    self.K.data[s, j] /= self.K.data[s, j].norm()
        seen = Seen()
        return torch.stack([self._output(sample, seen) for sample in x]), seen

    def _output(self, x: Tensor, seen: Seen) -> Tensor:
        reaches_match = not self.detach_gradients or (self.distance == "cosine" and not self.ad_hoc)
        z = self._psi(x if reaches_match else x.detach())
        if self.distance == "cosine":
            z = z / z.norm()
        outputs, winners, winner_responses = [], [], []
        for s in range(self.key_sets):
            responses = [self._response(z, self.K[s, j]) for j in range(self.key_mem_units)]
            selected = self._best([r.item() for r in responses])
            best = responses[selected[0]].detach()  # taken off every response, lest exp overflows
            exponentials = [torch.exp(self.gamma_alpha * (responses[j] - best)) for j in selected]
            unit = torch.zeros_like(self.M[s, 0])
            for place, j in enumerate(selected):
                alpha, memory = exponentials[place] / sum(exponentials), self.M[s, j]
                if self.upd_m == "WTA" and place > 0:
                    memory = memory.detach()
                    if self.upd_k == "grad_WTA":
                        alpha = alpha.detach()
                unit = unit + alpha * memory
            outputs += self._apply(unit, x)
            winners.append(selected[0])
            winner_responses.append(best.item())
        seen.z.append(z.detach())
        seen.winners.append(winners)
        seen.responses.append(winner_responses)
        return torch.stack(outputs)

    def _psi(self, x: Tensor) -> Tensor:
        if self.psi_fn == "sign":
            return torch.sign(x)
        if self.psi_fn == "identity":
            return x
        n, values = len(x), []
        for i in range(self.d):
            position = max((i + 0.5) * n / self.d - 0.5, 0.0)
            low = math.floor(position)
            high, part = min(low + 1, n - 1), position - low
            values.append((1 - part) * x[low] + part * x[high])
        return torch.stack(values)

    def _response(self, z: Tensor, key: Tensor) -> Tensor:
        if self.distance == "euclidean":
            return torch.exp(-((z - key) ** 2).sum() / (math.sqrt(self.d) * self.sigma_eu))
        return (z * key).sum() / math.sqrt(self.d)

    def _best(self, responses: list[float]) -> list[int]:
        ranking = sorted(range(self.key_mem_units), key=lambda j: -responses[j])
        count = min(self.delta, self.key_mem_units)
        for place in {1, count}:
            if place < self.key_mem_units:
                self._decide(responses[ranking[place - 1]], responses[ranking[place]])
        return ranking[:count]

    def _decide(self, one: float, other: float) -> None:
        gap = abs(one - other)
        if self.distance == "euclidean":
            gap /= max(one, other, 1e-300)  # responses to far samples are tiny, and still exact
        self.margin = min(self.margin, gap)

    def _apply(self, unit: Tensor, x: Tensor) -> list[Tensor]:
        n, width = self.in_features, self.in_features + self.bias
        outputs = []
        for p in range(self.out_features if self.shared_keys else 1):
            row = unit[p * width : (p + 1) * width]
            weights, inputs = row[:n], x
            bias = row[n] if self.bias else torch.zeros_like(unit[0])
            if self.layer_norm:
                gain, offset = unit[-2 * n : -n], unit[-n:]
                inputs = (x - x.mean()) / (((x - x.mean()) ** 2).sum() / (n - 1) + 1e-5)
                weights = gain * weights
                bias = bias + (weights * offset).sum()
            outputs.append((weights * inputs).sum() + bias)
        return outputs

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        """Scramble, move the keys and count, for one forward that was back-propagated."""
        for s in range(self.key_sets):
            winners = [winners[s] for winners in seen.winners]
            responses = [responses[s] for responses in seen.responses]
            for w in winners:
                self.key_counter[s][w] += 1
            if self.scramble:
                self._scramble(s, seen.z, winners, responses)
            if self.ad_hoc:
                self._move(s, seen.z, winners, responses)
                if len(winners) > 1:
                    winners = [
                        self._best([self._response(z, self.K[s, j]).item() for j in range(self.key_mem_units)])[0]
                        for z in seen.z
                    ]
            if self.scramble:
                for w in winners:
                    self.eta[s][w] = 0
                    self.mu[s][w] += 1
                for j in range(self.key_mem_units):
                    self.eta[s][j] += len(winners)

    def _scramble(self, s: int, z: list[Tensor], winners: list[int], responses: list[float]) -> None:
        weakest = min(range(len(z)), key=lambda i: responses[i])
        weak = [j for j in range(self.key_mem_units) if self.mu[s][j] < self.tau_mu and self.eta[s][j] >= self.tau_eta]
        for i in range(len(z)):
            if not torch.equal(z[i], z[weakest]):
                self._decide(responses[i], responses[weakest])
        self._decide(responses[weakest], self.tau_alpha)
        if responses[weakest] < self.tau_alpha and weak:
            recycled = max(weak, key=lambda j: self.eta[s][j])
            self.K.data[s, recycled] = z[weakest]
            self.M.data[s, recycled] = self.M.data[s, winners[weakest]]
            self.mu[s][recycled] = 0
            self.scrambling_count[s] += 1

    def _move(self, s: int, z: list[Tensor], winners: list[int], responses: list[float]) -> None:
        moved = [self.K[s, j].clone() for j in range(self.key_mem_units)]
        for sample, w, r in zip(z, winners, responses, strict=True):
            if self.distance == "cosine":
                moved[w] += self.beta_k * sample
            elif self.distance == "dot_scaled":
                moved[w] += self.beta_k / math.sqrt(self.d) * sample
            else:
                moved[w] += self.beta_k / (math.sqrt(self.d) * self.sigma_eu) * r * (sample - self.K[s, w])
        for j in range(self.key_mem_units):
            if self.distance == "cosine" and (len(z) > 1 or j == winners[0]):
                moved[j] /= moved[j].norm()
            self.K.data[s, j] = moved[j]

    def parameters(self) -> list[Tensor]:
        """What an optimizer learns."""
        return [self.M] if self.ad_hoc else [self.M, self.K]

    def counters(self) -> dict[str, Tensor]:
        """Usage, age and counts as integer tensors."""
        names = ("mu", "eta", "key_counter", "scrambling_count")
        return {name: torch.tensor(getattr(self, name)) for name in names}
