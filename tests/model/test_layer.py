"""A converted layer is one function, however it is called, and starts where it should."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from linearize.model import LinearizedForCausalLM, MixerConfig, cache_nbytes
from linearize.model.recurrences import RECURRENCES
from tests.tables import in_turn, some

WINDOW, SINKS, TOKENS = 16, 4, 120
KINDS = {
    "window": {"recurrence": "none"},
    "default": {},
    "softmax": {"mix": "softmax"},
    "fixed": {"mix": "fixed"},
    "no sinks": {"sinks": 0},
    "liger": {
        "sinks": 0, "mix": "fixed", "covers": "all", "normalize": False, "gate_scale": 1.0, "gate_bias": 0.0,
        "gate_divisor": 16.0, "gate_learned": False,
    },
    "softmax head": {"softmax_heads": [1]},
    "softmax heads, state of all": {"softmax_heads": [0, 3], "covers": "all", "mix": "softmax"},
    "softmax layer": {"layers": [1]},
    "liger-hgrn2": {
        "recurrence": "hgrn2", "sinks": 0, "mix": "fixed", "covers": "all", "normalize": False, "gate_scale": 1.0,
        "gate_bias": 0.0, "gate_learned": False,
    },
    "liger-gsa": {
        "recurrence": "gsa", "sinks": 0, "mix": "fixed", "covers": "all", "feature_map": "identity", "normalize": False,
        "gate_scale": 1.0, "gate_bias": 0.0, "gate_divisor": 16.0, "gate_learned": False,
    },
    "hgrn2, bounded": {"recurrence": "hgrn2", "lower_bound": 0.9},
    "gsa, 4 slots": {"recurrence": "gsa", "slots": 4, "feature_map": "identity", "mix": "softmax"},
    "kda, reflecting": {"recurrence": "kda", "negative_eigenvalues": True, "feature_map": "identity", "covers": "all"},
    "gates from queries": {"gate_source": "q", "feature_map": "exp"},
    "gates from values": {"gate_source": "v", "feature_map": "elu", "rope": True},
    "random gates": {"gate_source": "random", "feature_map": "learned", "qk_norm": True},
    "rwkv6, wide features": {"recurrence": "rwkv6", "feature_map": "exp", "covers": "all", "rope": True},
    "lightnet, wide features": {"recurrence": "lightnet", "feature_map": "learned"},
    "landmarks": {"landmarks": 24},
    "landmarks alone": {"landmarks": 24, "recurrence": "none"},
    "landmarks, a learned score": {"landmarks": 24, "landmark_score": "learned", "recurrence": "none"},
    "landmarks, few and shared": {"landmarks": 5, "mix": "softmax", "rope": True, "sinks": 0},
    "landmarks, gates from queries": {"landmarks": 40, "gate_source": "q", "softmax_heads": [1]},
    "int8 window": {"memory_dtype": "int8", "recurrence": "none"},
    "int8": {"memory_dtype": "int8"},
    "int8, gates from queries": {"memory_dtype": "int8", "gate_source": "q", "softmax_heads": [1]},
    "int8, state of all": {"memory_dtype": "int8", "covers": "all", "rope": True, "mix": "fixed"},
    "int8 landmarks": {"memory_dtype": "int8", "landmarks": 24, "mix": "softmax", "rope": True},
    "int8 landmarks alone": {"memory_dtype": "int8", "landmarks": 24, "recurrence": "none"},
    "int4 landmarks": {"memory_dtype": "int4", "landmarks": 24},
    "int4 landmarks alone": {"memory_dtype": "int4", "landmarks": 40, "recurrence": "none", "sinks": 0},
    "int4 landmarks, gates from queries": {"memory_dtype": "int4", "landmarks": 40, "gate_source": "q", "rope": True},
    **{name: {"recurrence": name} for name in RECURRENCES if name != "gla"},
    **{f"landmarks, {name}": {"recurrence": name, "landmarks": 16} for name in ("rwkv6", "lightnet", "mlstm", "kda")},
}  # fmt: skip
# Kinds in which each part of the memory, each way to mix and each layout of a state occurs.
DISTINCT = [
    "window", "default", "no sinks", "softmax heads, state of all", "softmax layer", "gsa, 4 slots", "kda, reflecting",
    "gates from values", "landmarks", "landmarks, few and shared", "int8", "int4 landmarks", "lightnet", "mlstm",
    "gateloop", "mingru",
]  # fmt: skip
# Before and after the window is full: single tokens, short pieces, and one longer than the window.
SIZES = [[1] * 20 + [7] * 5 + [1, 33, 3] + [1] * 28, [1] * TOKENS, [7] * 17 + [1], [1, 50, 3, 66], [17, 103], [TOKENS]]


def converted(teacher: PreTrainedModel, *, awake: bool = True, **changes) -> LinearizedForCausalLM:
    """The teacher converted; `awake` gives the mix a weight, as training would."""
    layers = list(range(teacher.config.num_hidden_layers))
    config = MixerConfig(**{"layers": layers, "window": WINDOW, "sinks": SINKS, **changes})
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), [config]).eval()
    if awake:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("mix_weight"):
                parameter.data = 0.3 + 0.2 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith(("score_weight", "key_shift")):  # fitted by `convert`
                parameter.data = torch.randn(parameter.shape, generator=generator)
            elif name.endswith("key_scale"):
                parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    # In float64, because a code of a memory in 8 or 4 bits may change with the last bit of a float32.
    return model.double() if "memory_dtype" in changes else model


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def in_pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, outputs, start = None, [], 0
    for size in sizes:
        result = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, start + size
        outputs.append(result.logits)
    assert start == ids.shape[1]
    return torch.cat(outputs, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("covers") != "all"])
def test_a_window_over_everything_is_the_teacher(teacher, ids, kind):
    wanted = teacher(ids).logits
    # Keys and values in 8 bits change the logits by about 1 % of the largest.
    atol = (3e-2 if "memory_dtype" in KINDS[kind] else 1e-5) * float(wanted.abs().max())
    # Window and sinks together hold everything, with one token to spare.
    for window in (TOKENS - SINKS, TOKENS) if KINDS[kind].get("sinks", SINKS) else (TOKENS,):
        logits = converted(teacher, **{**KINDS[kind], "window": window})(ids).logits
        torch.testing.assert_close(logits.float(), wanted, rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "default", "softmax", "no sinks", "softmax head", "softmax layer"])
def test_starts_as_the_teacher_under_a_window_and_sinks(teacher, ids, kind):
    """What keeps softmax keeps the teacher's own mask: per head, and per layer."""
    sinks, config = KINDS[kind].get("sinks", SINKS), teacher.config
    token = torch.arange(TOKENS)
    causal = (token <= token[:, None]).expand(2, config.num_attention_heads, -1, -1)
    seen = causal & ((token > token[:, None] - WINDOW) | (token < sinks))
    for head in KINDS[kind].get("softmax_heads", ()):
        group = config.num_attention_heads // config.num_key_value_heads
        seen[:, head * group : (head + 1) * group] = causal[:, :group]
    masked = copy.deepcopy(teacher)
    for index, layer in enumerate(masked.model.layers):
        mask = seen if index in KINDS[kind].get("layers", range(config.num_hidden_layers)) else causal
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    close(converted(teacher, awake=False, **KINDS[kind])(ids).logits, masked(ids).logits)


@pytest.mark.parametrize("kind", ["default", "softmax"])
def test_training_can_wake_the_recurrence(teacher, ids, kind):
    model = converted(teacher, awake=False, **KINDS[kind])
    model(ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("mix_weight")}
    assert gradients and all(float(g.abs().max()) > 0 for g in gradients.values())
    model = converted(teacher, **KINDS[kind])
    model(ids, labels=ids).loss.backward()
    own = {n: p.grad for n, p in model.named_parameters() if ".mixer." in n}
    assert any("gate_bias" in name for name in own)
    assert all(g is not None and float(g.abs().max()) > 0 for g in own.values())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", some(SIZES, SIZES[:1]))
def test_pieces_equal_the_whole(teacher, ids, kind, sizes):
    model = converted(teacher, **KINDS[kind])
    close(in_pieces(model, ids, sizes), model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "side"), in_turn(list(KINDS), ["left", "right", "both"]))
def test_pads_change_nothing(teacher, ids, kind, side):
    model = converted(teacher, **KINDS[kind])
    whole = model(ids, use_cache=False).logits
    width, lengths, more = 90, (80, 33), (20, 27)

    def padded(starts: tuple[int, int], lengths: tuple[int, int], width: int, where: str) -> tuple[Tensor, Tensor]:
        tokens, mask = torch.full((2, width), 3), torch.zeros(2, width, dtype=torch.long)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            first = {"left": width - length, "right": 0, "both": (width - length) // 2}[where]
            tokens[row, first : first + length] = ids[row, start : start + length]
            mask[row, first : first + length] = 1
        return tokens, mask

    tokens, mask = padded((0, 0), lengths, width, side)
    first = model(tokens, attention_mask=mask, use_cache=True)
    again, more_mask = padded(lengths, more, 30, side)
    total = torch.cat([mask, more_mask], 1)
    second = model(again, attention_mask=total, past_key_values=first.past_key_values)
    for row in range(2):
        close(first.logits[row][mask[row].bool()], whole[row, : lengths[row]])
        close(second.logits[row][more_mask[row].bool()], whole[row, lengths[row] : lengths[row] + more[row]])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_separate_rows(teacher, ids, kind):
    model = converted(teacher, **KINDS[kind])
    borders = (0, 30, 31, 100, TOKENS)
    pieces = list(itertools.pairwise(borders))
    positions = torch.cat([torch.arange(stop - start) for start, stop in pieces]).expand(2, -1)
    packed = model(ids, position_ids=positions)  # by default with no cache, which has no row for each document
    assert packed.past_key_values is None
    close(packed.logits, torch.cat([model(ids[:, a:b], use_cache=False).logits for a, b in pieces], 1))


def test_packed_rows_have_no_cache(teacher, ids):
    model = converted(teacher)
    positions = torch.cat([torch.arange(30), torch.arange(TOKENS - 30)]).expand(2, -1)
    for asked in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="packed documents, which no cache can continue"):
            model(ids, position_ids=positions, **asked)


def test_gradients_do_not_depend_on_pads(teacher, ids):
    model = converted(teacher)
    row = ids[:1, :50]

    def gradient(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        labels = tokens.masked_fill(mask.cumsum(1) * mask <= 1, -100)  # neither pads nor a row's first token
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradient(row, torch.ones_like(row))
    padded = gradient(F.pad(row, (9, 5), value=7), F.pad(torch.ones_like(row), (9, 5)))
    for name, value in plain.items():
        assert float((value - padded[name]).norm()) <= 1e-4 * float(value.norm()) + 1e-7, name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["liger", "liger-hgrn2", "liger-gsa"])
def test_liger_equals_the_published_equations(teacher, ids, kind):
    """The whole model again in plain torch, from the paper's released code: no function of ours is used."""
    model = converted(teacher, **KINDS[kind])
    inner, config = teacher.model, teacher.config
    heads, width = config.num_attention_heads, inner.layers[0].self_attn.head_dim
    group = heads // config.num_key_value_heads
    hidden = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(hidden, torch.arange(TOKENS)[None])
    token = torch.arange(TOKENS)
    seen = (token <= token[:, None]) & (token > token[:, None] - WINDOW)
    for layer in inner.layers:
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            project(normed).view(2, TOKENS, -1, width).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        # GSA pools all heads' keys to slots x heads channels, and has as many slots as a head is wide.
        pooled = F.adaptive_avg_pool1d(k.transpose(1, 2).flatten(2), width * config.num_key_value_heads)
        slots = pooled.unflatten(2, (-1, width)).transpose(1, 2).repeat_interleave(group, 1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        log_gate = F.logsigmoid({"liger": k, "liger-hgrn2": k, "liger-gsa": slots}[kind])
        gate = torch.exp(log_gate if kind == "liger-hgrn2" else log_gate / 16)
        write = {"liger": k.softmax(-1), "liger-hgrn2": 1 - torch.sigmoid(k), "liger-gsa": 1 - gate}[kind]
        state, slot_keys = torch.zeros(2, heads, width, width), torch.zeros(2, heads, width, width)
        outputs = []
        for t in range(TOKENS):
            read = q[:, :, t].softmax(-1)
            if kind == "liger-gsa":
                slot_keys = gate[:, :, t, :, None] * slot_keys + write[:, :, t, :, None] * k[:, :, t, None, :]
                read = torch.einsum("bhd,bhmd->bhm", q[:, :, t], slot_keys).softmax(-1)
            state = gate[:, :, t, :, None] * state + write[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append(torch.einsum("bhd,bhdv->bhv", read, state))
        recurrent = torch.stack(outputs, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = (q @ k.transpose(-1, -2) * width**-0.5).masked_fill(~seen, float("-inf"))
        mixed = 0.5 * scores.softmax(-1) @ v + 0.5 * recurrent
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    close(model(ids).logits, teacher.lm_head(inner.norm(hidden)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["default", "liger"])
def test_memory_has_the_same_size_after_100_and_20000_tokens(teacher, kind):
    model = converted(teacher, **KINDS[kind])
    sizes, cache, done = [], None, 0
    for upto in (100, 20_000):
        while done < upto:
            step = min(2_000, upto - done)
            # Positions stay small: the tiny model was trained on 512, and memory does not depend on them.
            positions = (torch.arange(step) % 500)[None]
            result = model(
                torch.full((1, step), 9),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, done = result.past_key_values, done + step
        sizes.append(cache_nbytes(cache))
        assert bool(torch.isfinite(result.logits).all())
    assert sizes[0] == sizes[1] > 0
    assert cache.get_seq_length() == 20_000


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(teacher, ids):
    cache = DynamicCache()
    teacher(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="not converted"):
        converted(teacher)(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_finite(teacher, ids, dtype):
    half = converted(teacher).to(dtype)
    full = converted(teacher)
    error = (half(ids).logits.float() - full(ids).logits).norm() / full(ids).logits.norm()
    plain = (copy.deepcopy(teacher).to(dtype)(ids).logits.float() - teacher(ids).logits).norm() / teacher(
        ids
    ).logits.norm()
    assert float(error) <= 2 * float(plain)
    close(in_pieces(half, ids, [1] * TOKENS).float() * 0, full(ids).logits * 0)  # finite all the way


def test_gradient_checkpointing_keeps_gradients(teacher, ids):
    model = converted(teacher).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_masks_that_do_more_than_tell_pads_are_refused(teacher, ids):
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for mask in (causal.expand(2, 1, -1, -1), causal[None, None, -1:], {"full_attention": None}):
        with pytest.raises(ValueError, match="and no other"):
            converted(teacher)(ids, attention_mask=mask)


def test_layers_that_are_not_there_are_refused(teacher):
    with pytest.raises(ValueError, match="layers 0 to"):
        LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), [MixerConfig(layers=[99])])
