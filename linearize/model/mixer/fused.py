"""The fused kernels of a mixer: translation of its options, choice of a kernel, and the call.

    fused_step        one token a row, no gradient: everything in one launch, in place; with landmarks, but for merges
    fused_attention   more tokens: window, sinks, recurrence and mix in one operation, with gradients

With landmarks, the step is `landmarks/fused.py`, and `landmarks/text.py` takes more tokens. `fuses`
decides if they run; otherwise `Mixer.forward` does the same in plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from linearize_kernels import Decision, Operation, Step, StepWeights, choose, decide
from linearize_kernels.dispatch import settled
from linearize_kernels.liger import liger_attention
from linearize_kernels.liger_options import Columns, Gate, LigerOptions
from torch import Tensor

from linearize.model.memory import store
from linearize.model.mixer.trial import passes
from linearize.model.mixer.window import fill, slide, starts

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer, Projections
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase

# The recurrences that the kernels support: the axis of the gate, and the sign of the gate's input.
_GATES: dict[str, tuple[Any, float]] = {
    "gla": ("channel", 1.0),
    "hgrn2": ("channel", 1.0),
    "gated_retention": ("head", 1.0),
    "mamba2": ("head", -1.0),
    "retention": ("retention", 1.0),
    "linear": ("none", 1.0),
}
_BOUNDED = ("gla", "hgrn2", "gated_retention")
_MOST_QUERIES = 16
_WIDEST = 256
_TURNED = (64, 128, 256)


def refusal(operation: Operation, config: MixerConfig, layer: AttentionLayer) -> str | None:
    """The reason why no fused kernel takes a mixer of this configuration; None if one does."""
    if config.landmarks:
        return _refusal_of_landmarks(operation, config, layer)
    if config.memory_dtype != "auto":
        return f"no fused kernel for a memory in {config.memory_dtype}"
    if config.recurrence not in _GATES and (operation == "attention" or config.recurrence != "none"):
        return f"no fused kernel for {'the window alone' if config.recurrence == 'none' else config.recurrence}"
    if layer.query_heads // layer.key_value_heads > _MOST_QUERIES:
        return f"more than {_MOST_QUERIES} query heads share a key/value head"
    doubled = operation == "attention" and config.feature_map in ("exp", "learned")
    if max(layer.key_width * (2 if doubled else 1), layer.value_width) > _WIDEST:
        return f"heads wider than {_WIDEST}" + (f" under {config.feature_map}" if doubled else "")
    return None


def _refusal_of_landmarks(operation: Operation, config: MixerConfig, layer: AttentionLayer) -> str | None:
    if operation == "step" and config.recurrence != "none":
        return f"no fused kernel for landmarks beside {config.recurrence}"
    if layer.query_heads // layer.key_value_heads > _MOST_QUERIES:
        return f"more than {_MOST_QUERIES} query heads share a key/value head"
    for width in (layer.key_width, layer.value_width):
        # The Hadamard matrix of 4 bits turns all channels of a head together.
        turned = operation == "step" and config.memory_dtype == "int4"
        if width % 2 or width > _WIDEST or (turned and width not in _TURNED):
            return f"heads of width {width} with landmarks in {config.memory_dtype}"
    return None


def decide_mixer(
    config: MixerConfig, layer: AttentionLayer, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Decision]:
    """The kernels that run a mixer of this configuration on a device and in a dtype, with the reasons: `prefill` (and
    training), a decoding `step`, and the `recurrence` alone if it is not part of a fused kernel.

    Raises:
        UnknownKernelsError: `LINEARIZE_KERNELS` is none of its choices.
    """
    operations: dict[str, Operation] = {"prefill": _operation(config, 2), "step": "step"}
    found = {name: decide(o, device, dtype, refusal=refusal(o, config, layer)) for name, o in operations.items()}
    if config.landmarks and (own := decide("slots", device, dtype)).kernels == "native":
        found = dict.fromkeys(found, own)
    if config.recurrence != "none" and any(decision.kernels != "triton" for decision in found.values()):
        kind: Operation = (
            "gated_values"
            if config.recurrence in ("gsa", "rg_lru", "mingru")
            else "delta_rule"
            if config.recurrence in ("gated_deltanet", "kda", "rwkv7")
            else "gla"
        )
        found["recurrence"] = decide(kind, device, torch.float32 if dtype != torch.float64 else dtype)
    return found


def _operation(config: MixerConfig, tokens: int) -> Operation:
    """The operation that mixes as many tokens a row."""
    return "step" if tokens == 1 else "slots" if config.landmarks else "attention"


def fuses(mixer: MixerBase, new: Projections, memory: LayerMemory | None) -> bool:
    """True if a fused kernel runs `Mixer.forward` on these arguments."""
    # torch.compile fuses by itself, and the kernels are not checked inside compiled graphs.
    if mixer.branches_off or torch.compiler.is_compiling() or settled(new.v.device):
        return False
    operation = _operation(mixer.config, new.q.shape[1])
    if operation == "step" and (memory is None or torch.is_grad_enabled()):
        return False
    device, dtype = new.v.device, new.v.dtype
    reason = refusal(operation, mixer.config, mixer.layer)
    return choose(operation, device, dtype, refusal=reason) == "triton" and passes(operation, mixer, device, dtype)


def fused_step(
    mixer: MixerBase,
    new: Projections,
    lengths: Tensor | None,
    memory: LayerMemory,
    *,
    counts: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`Mixer.forward` for one token a row, without a gradient; its result has `dtype`.

    Args:
        counts: `[B]` tokens seen before this one, if those of the memory have it already.
    """
    if mixer.config.landmarks:
        from linearize.model.landmarks.fused import fused_landmark_step

        return fused_landmark_step(mixer, new, lengths, memory, counts, dtype)
    from linearize_kernels.step_triton import step_triton

    before = memory.counts if counts is None else counts
    return step_triton(_step_of(mixer), _weights_of(mixer), new, memory.parts, before, lengths, dtype=dtype)


def fused_attention(
    mixer: MixerBase,
    new: Projections,
    lengths: Tensor | None,
    memory: LayerMemory | None,
    *,
    documents: Tensor | None = None,
) -> Tensor:
    """`Mixer.forward` for several tokens a row.

    Args:
        documents: `[S + 1]`, the starts of documents in `new` `[B, T, ...]` taken row after row, and their end; without
            lengths and memory.
    """
    config, recurrence = mixer.config, mixer.recurrence
    shape = new.q.shape[:2]
    if documents is not None:
        new = new._replace(**{name: x.flatten(0, 1)[None] for name, x in new._asdict().items()})
    assert recurrence is not None  # noqa: S101 - for the type checker; `refusal` has looked
    columns: tuple[Tensor, ...] | None
    whole: Part | None = None  # of a memory with tokens: its window, oldest first, and the new ones `[R, W + L, ...]`
    if memory is None or starts(memory, lengths):
        columns = mixer.sinks(new) if documents is None else _first_tokens(mixer, new, documents)
        if memory is not None:
            fill(mixer, new, memory)
    else:
        span = slide(mixer, new, lengths, memory)
        whole, columns = span.whole, span.columns
    past = 0 if whole is None else mixer.window
    source = mixer.source(new)
    given = {"k": new.k, "k_rotated": new.k_rotated, "v": new.v, "source": source}
    if whole is not None:
        # With `covers: all` the state already holds the tokens of the window, so their inputs are padded with zeros.
        given = {name: whole[name] if name in whole else F.pad(x, (0, 0, 0, 0, past, 0)) for name, x in given.items()}
        if config.covers == "evicted" and config.gate_source != "q":
            given["source"] = given["v" if config.gate_source == "v" else "k"]
    q, k = (new.q_rotated, given["k_rotated"]) if config.rope else (new.q, given["k"])
    gate: Tensor | Gate
    plain = config.recurrence != "hgrn2" and config.feature_map == "softmax" and not config.qk_norm
    if (
        plain
        and config.recurrence == "gla"
        and config.gate_source == "k"
        and not config.rope
        and not config.lower_bound
    ):
        gate = Gate(*_gate_weights(mixer, new.q.device), config.gate_divisor)
    else:
        log_gate = recurrence.log_gate(given["source"].float())
        gate = recurrence.per_feature(log_gate)
        if not plain:
            q, k = recurrence.features(q.float()), recurrence.written(k.float(), log_gate)  # type: ignore[operator]
    dtype = new.v.dtype
    operands = (new.q_rotated, given["k_rotated"], given["v"], q, k)
    options = LigerOptions(
        window=mixer.window,
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        mix=config.mix,
        covers=config.covers,
        normalize=config.normalize,
        feature_map="softmax" if plain else "identity",
    )
    sinks = None if columns is None else Columns(columns[0].to(dtype), columns[1].to(dtype), config.sinks)
    rows, tokens = new.q.shape[:2]
    row_starts: Tensor | int = rows if documents is None else documents
    of_query = of_keys = None
    if lengths is not None:
        row_starts, of_query, of_keys = _packing(lengths, tokens, past)
    choices = (of_query, of_keys, of_keys, of_query, of_keys)
    q_rotated, k_rotated, v, q, k = (_chosen(x.to(dtype), at) for x, at in zip(operands, choices, strict=True))
    state = memory.parts["state"]["state"] if memory is not None else None
    outputs, final = liger_attention(
        q_rotated,
        k_rotated,
        v,
        q,
        k,
        gate if isinstance(gate, Gate) else _chosen(gate, of_keys),
        options,
        mix_weight=mixer._parameters.get("mix_weight"),
        columns=sinks,
        rows=row_starts,
        counts=memory.counts.clone() if memory is not None and whole is not None else None,
        # The kernel's backward reads the initial state, and `store` overwrites the memory's tensor below.
        initial_state=state.clone() if state is not None else None,
    )
    if memory is not None:
        store(memory.parts["state"], "state", final)
    if of_query is not None:
        outputs = outputs.new_zeros(rows * tokens, *outputs.shape[1:]).index_copy(0, of_query, outputs)
    mixed: Tensor = outputs.unflatten(0, shape)
    return mixed


def _first_tokens(mixer: MixerBase, new: Projections, documents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the first tokens of documents, their sinks `[S, M, ...]`; those of a shorter document, which
    has no query that reads them, are of others."""
    sinks = mixer.config.sinks
    if not sinks:
        return None
    at = documents[:-1, None] + torch.arange(sinks, device=documents.device)
    at = at.clamp_max(new.v.shape[1] - 1)
    return new.k_rotated[0, at], new.v[0, at]


def _packing(lengths: Tensor, tokens: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of unequal lengths one after the other, without their padding: the start of each row `[R + 1]`, and the
    indices of the real queries in `[R, tokens]` and of the real keys in `[R, past + tokens]`. Cached on `lengths`,
    because all layers share it and `nonzero` syncs the device."""
    kept = lengths.__dict__.setdefault("_packings", {})
    if (tokens, past) not in kept:
        real = torch.arange(tokens, device=lengths.device) < lengths[:, None]
        of_query, of_keys = (x.flatten().nonzero()[:, 0] for x in (real, F.pad(real, (past, 0), value=True)))
        kept[tokens, past] = F.pad(lengths.cumsum(0), (1, 0)).int(), of_query, of_keys
    found: tuple[Tensor, Tensor, Tensor] = kept[tokens, past]
    return found


def _chosen(x: Tensor, at: Tensor | None) -> Tensor:
    """`x` `[R, L, ...]` with rows and tokens flattened; with `at`, only the tokens at these indices."""
    flat = x.flatten(0, 1)
    return flat if at is None else flat[at]


def _gate_weights(mixer: MixerBase, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and bias of a gate per channel, `[K, D]`."""
    recurrence = mixer.recurrence
    assert recurrence is not None  # noqa: S101 - for the type checker
    if "gate_scale" in recurrence._parameters:
        return recurrence.gate_scale, recurrence.gate_bias
    shape = (recurrence.key_value_heads, recurrence.key_width)
    starts = recurrence.gate_scale_start, recurrence.gate_bias_start
    scale, bias = (torch.full(shape, start, device=device) for start in starts)
    return scale, bias


def _step_of(mixer: MixerBase) -> Step:
    """The options of a decoding step of `mixer`, as the kernel takes them."""
    config, recurrence = mixer.config, mixer.recurrence
    window: dict[str, Any] = {
        "window": mixer.window,
        "sinks": config.sinks,
        "scale": mixer.layer.scale,
        "softcap": mixer.layer.softcap,
    }
    if recurrence is None:
        return Step(**window)
    gate, sign = _GATES[config.recurrence]
    return Step(
        **window,
        gate=gate,
        gate_sign=sign,
        gate_scale=recurrence.gate_scale_start,
        gate_bias=recurrence.gate_bias_start,
        gate_divisor=config.gate_divisor,
        gate_bound=config.lower_bound * recurrence.depth if config.recurrence in _BOUNDED else 0.0,
        source="k" if config.gate_source == "random" else config.gate_source,
        features=config.feature_map,
        qk_norm=config.qk_norm,
        writes_gate=config.recurrence == "hgrn2",
        covers_all=config.covers == "all",
        rope=config.rope,
        normalize=config.normalize,
        mix=config.mix,
    )


def _weights_of(mixer: MixerBase) -> StepWeights:
    """The parameters that go with `_step_of`."""
    own = {} if mixer.recurrence is None else mixer.recurrence._parameters
    return StepWeights(
        gate_scale=own.get("gate_scale"),
        gate_bias=own.get("gate_bias"),
        gate_projection=own.get("gate_projection"),
        feature_projection=own.get("feature_projection"),
        mix=mixer._parameters.get("mix_weight"),
    )
