"""The equations of the recurrences' papers, one token at a time in plain torch; nothing of ours is used.

Each recurrence is two functions: `update(token, state)` gives the next state, and `read(token, before, after, wrote)`
what the token reads. Where there is a mass it is the last column. What `linearize.model.recurrences` changes on
purpose: gates come from pretrained keys, and delta rules take queries and keys of length 1.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

State = dict[str, Tensor]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def pooled(x: Tensor, width: int) -> Tensor:
    """Averages of neighbouring channels over all heads `[R, K, D]`, to `width` a head (AdaptiveAvgPool1d)."""
    flat, many = x.flatten(1), x.shape[1] * width
    count = flat.shape[1]
    bins = [flat[:, i * count // many : -(-(i + 1) * count // many)].mean(1) for i in range(many)]
    return torch.stack(bins, 1).unflatten(1, (x.shape[1], width))


def features(x: Tensor, config, p: dict[str, Tensor]) -> Tensor:
    """The feature map of `[R, K, G, D]`."""
    if config.qk_norm:
        x = x / x.norm(dim=-1, keepdim=True)
    if config.feature_map == "learned":
        x = torch.einsum("rkgd,kde->rkge", x, p["feature_projection"])
    if config.feature_map == "identity":
        return x
    if config.feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    up, down = (torch.exp(y - y.amax(-1, keepdim=True)) for y in (x, -x))
    up, down = up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)
    return up if config.feature_map == "softmax" else torch.cat([up, down], -1)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("rkd,rkv->rkdv", k, v)


def answer(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("rkgd,rkdv->rkgv", q, state)


def with_mass(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def wide(gate: Tensor, t: Token) -> Tensor:
    """A channel's gate serves both of its features."""
    return gate if gate.shape[-1] in (1, t.k.shape[-1]) else torch.cat([gate, gate], -1)


class Token(SimpleNamespace):
    """One token: q `[R, K, G, F]` and k `[R, K, F]` behind the feature map, q_raw before it, v, source, x (the gate's
    input), g = σ(x)^(1/divisor), the divisor, p (parameters), bound (the gate's lower one)."""


class Gla:
    """S = diag(g) S + kᵀ v, o = q S (GLA, equation 3)."""

    def gate(self, t: Token) -> Tensor:
        return t.g

    def written(self, t: Token) -> Tensor:
        return t.k

    def update(self, t: Token, s: State) -> State:
        return {"state": wide(self.gate(t), t)[..., None] * s["state"] + outer(self.written(t), with_mass(t.v))}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        return answer(t.q, after["state"])


class Linear(Gla):
    def gate(self, t: Token) -> Tensor:
        return torch.ones_like(t.v[..., :1])


class Retention(Gla):
    """γ = 1 - 2^(-5 - arange(h)) (RetNet, equation 8)."""

    def gate(self, t: Token) -> Tensor:
        rates = [1 - 2.0 ** (-5 - head) for head in range(t.v.shape[1])]
        return torch.tensor(rates, dtype=t.v.dtype)[:, None].expand(len(t.v), -1, 1)


class HGRN2(Gla):
    """g = γ + (1 - γ) σ, k = 1 - g (HGRN2, equation 3)."""

    def gate(self, t: Token) -> Tensor:
        return t.bound + (1 - t.bound) * t.g

    def written(self, t: Token) -> Tensor:
        return wide(1 - self.gate(t), t)


class Mamba2(Gla):
    """exp(-softplus) = exp(-Δ A) with A = 1 (Mamba-2's scalar decay)."""

    def gate(self, t: Token) -> Tensor:
        return torch.exp(-torch.log1p(torch.exp(t.x)) / t.divisor)


class RWKV6(Gla):
    """w = exp(-exp(d)); o = r (diag(u) kᵀ v + S_{t-1}), then S = diag(w) S + kᵀ v (Finch, section 4)."""

    def gate(self, t: Token) -> Tensor:
        # exp(-exp(10)) is 0 in any dtype already; exp of much more than 10 is not finite.
        return torch.exp(-torch.exp(t.x.clamp(max=10)) / t.divisor)

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        own = outer(t.p["log_bonus"].exp() * t.k, with_mass(t.v))
        return answer(t.q, before["state"] + torch.where(wrote, own, 0))


class MLSTM(Gla):
    """C, n = f C + i kᵀ v, f n + i k; C q / max(|n q|, 1) (xLSTM, equations 19 to 27), with no stabilizer."""

    def written(self, t: Token) -> Tensor:
        return torch.exp(t.p["input_scale"] * t.source.mean(-1, keepdim=True) + t.p["input_bias"]) * t.k

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        sums = answer(t.q, after["state"])
        return sums[..., :-1] / sums[..., -1:].abs().clamp(min=1)


class LightNet:
    """What the additive decay stands for: Σ exp(x_s)ᵀ v_s over Σ exp(x_s), per channel."""

    def update(self, t: Token, s: State) -> State:
        weight = torch.exp(t.x)
        return {"sum": s["sum"] + weight, "values": s["values"] + outer(weight, with_mass(t.v))}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        empty = after["sum"] == 0
        state = after["values"] / torch.where(empty, 1, after["sum"])[..., None]
        return answer(t.q, torch.cat([state, state], 2) if t.q.shape[-1] != state.shape[2] else state)


class GateLoop:
    """S = σ exp(iθ) S + kᵀ v over the complex numbers, o = Re(q S) (GateLoop, equation 5)."""

    def update(self, t: Token, s: State) -> State:
        turn = t.p["phase"] * t.source
        gate = wide(t.g * torch.complex(turn.cos(), turn.sin()), t)
        return {"state": gate[..., None] * s["state"] + outer(t.k, t.v)}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        return answer(t.q, after["state"].real)


class KDA:
    """S = (I - β k̂ᵀ k̂) diag(g) S + β k̂ᵀ v (KDA, equation 1; gated DeltaNet, equation 10, with one gate)."""

    def update(self, t: Token, s: State) -> State:
        k = unit(t.k)
        beta = sigmoid(t.p["write_scale"] * t.source.mean(-1, keepdim=True) + t.p["write_bias"]) * t.most_write
        kept = wide(t.g, t)[..., None] * s["state"]
        held = torch.einsum("rkd,rkdv->rkv", k, kept)
        return {"state": kept + outer(beta * k, t.v - held)}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        return answer(unit(t.q), after["state"])


class RWKV7:
    """S = S (diag(w) - κ̂ᵀ (a ⊙ κ̂)) + vᵀ k̃ with S as values x keys, as the paper has it (RWKV-7, equations 8 to 20);
    w = exp(-e^(-1/2) σ(d)), k̃ = κ̂ ⊙ (1 + (a - 1) ⊙ α); the bonus is (r · (ρ ⊙ k̃)) v. The paper's k̃ has the key as
    projected in the place of κ̂."""

    def replaced(self, t: Token) -> Tensor:
        return unit(t.k) * (1 + (self.rate(t) - 1) * t.p["replacement"])

    def rate(self, t: Token) -> Tensor:
        return wide(sigmoid(t.p["rate_scale"] * t.source + t.p["rate_bias"]), t)

    def update(self, t: Token, s: State) -> State:
        k = unit(t.k)
        w = wide(torch.exp(-(torch.e**-0.5) * sigmoid(t.x) / t.divisor), t)
        transition = torch.diag_embed(w) - outer(k, self.rate(t) * k)
        transposed = s["state"].transpose(-1, -2) @ transition + outer(t.v, self.replaced(t))
        return {"state": transposed.transpose(-1, -2)}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        weight = torch.einsum("rkgd,rkd->rkg", unit(t.q), t.p["bonus"] * self.replaced(t))
        own = weight[..., None] * t.v[:, :, None]
        return answer(unit(t.q), after["state"]) + torch.where(wrote, own, 0)


class GSA:
    """K̃ = diag(g) K̃ + (1 - g)ᵀ k, Ṽ likewise, o = softmax(q K̃ᵀ) Ṽ (GSA, equation 5)."""

    def update(self, t: Token, s: State) -> State:
        gate, write = t.g[..., None], 1 - t.g
        return {
            "keys": gate * s["keys"] + outer(write, t.k),
            "values": gate * s["values"] + outer(write, with_mass(t.v)),
        }

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        weights = answer(t.q, after["keys"].transpose(-1, -2)).softmax(-1)
        return answer(weights, after["values"])


class MinGRU:
    """h = (1 - z) h + z v, z = 1 - g (minGRU, section 3.1), opened by 2 σ(q)."""

    def gate(self, t: Token) -> Tensor:
        return t.g

    def admitted(self, t: Token) -> Tensor:
        return (1 - self.gate(t)) * t.v

    def update(self, t: Token, s: State) -> State:
        return {"state": self.gate(t) * s["state"] + self.admitted(t)}

    def read(self, t: Token, before: State, after: State, wrote: Tensor) -> Tensor:
        return 2 * sigmoid(t.q_raw) * after["state"][:, :, None]


class RGLRU(MinGRU):
    """log a = -8 softplus(Λ) r; h = a h + sqrt(1 - a²) ⊙ (i ⊙ v) (Griffin, section 2.4)."""

    def log_gate(self, t: Token) -> Tensor:
        return -8 * torch.log1p(torch.exp(t.p["decay"])) * sigmoid(t.x) / t.divisor

    def gate(self, t: Token) -> Tensor:
        return torch.exp(self.log_gate(t))

    def admitted(self, t: Token) -> Tensor:
        share = -torch.expm1(2 * self.log_gate(t))  # 1 - a²
        return share.sqrt() * sigmoid(t.p["input_scale"] * t.source + t.p["input_bias"]) * t.v


EQUATIONS = {
    "gla": Gla(), "hgrn2": HGRN2(), "gsa": GSA(), "gated_retention": Gla(), "retention": Retention(),
    "mamba2": Mamba2(), "mlstm": MLSTM(), "rwkv6": RWKV6(), "rwkv7": RWKV7(), "gated_deltanet": KDA(), "kda": KDA(),
    "gateloop": GateLoop(), "lightnet": LightNet(), "rg_lru": RGLRU(), "mingru": MinGRU(), "linear": Linear(),
}  # fmt: skip
GATE_WIDTH = {"gated_retention": 1, "mamba2": 1, "mlstm": 1, "gated_deltanet": 1, "linear": 0, "retention": 0}
WITHOUT_MASS = {"mlstm", "rwkv7", "gated_deltanet", "kda", "gateloop", "rg_lru", "mingru"}
