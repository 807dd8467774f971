"""Every family, on a tiny random model: nothing of the architecture is lost."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from linearize.conversion.swap import mixers_for
from linearize.errors import RecipeError
from linearize.families import family_of
from linearize.generation.state import State
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.model.attention import LinearizedAttention
from linearize.recipe import MixerSpec
from tests.tables import some

LENGTHS = (60, 37)
PROMPTS = (30, 21)
WINDOW, SINKS = 12, 3
OWN = 20  # a family's own sliding window: wider than WINDOW, narrower than the text
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def phi3(original: int) -> dict:
    """LongRoPE on half of each head's channels, with the long factors beyond `original` tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 5.0], "original_max_position_embeddings": original,
    }  # fmt: skip
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


def sliding(kinds: str) -> dict:
    """One letter per layer: `s`liding or `f`ull."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {"num_hidden_layers": len(kinds), "sliding_window": OWN, "layer_types": [names[kind] for kind in kinds]}


ROWS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama 3.1 positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": OWN}),
    "ministral": ("ministral", sliding("sf")),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, sliding": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": OWN}),
    "qwen2": ("qwen2", {}),
    "qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": OWN, "max_window_layers": 1}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen2_moe, mixed": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "use_sliding_window": True, "sliding_window": OWN},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, mixed, biases": ("qwen3", {**sliding("sf"), "use_sliding_window": True, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0]}),
    "qwen3_moe, sliding": ("qwen3_moe", {**EXPERTS, "use_sliding_window": True, "sliding_window": OWN}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": OWN, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0}),
    "gemma2, untied embeddings": ("gemma2", {"sliding_window": OWN, "tie_word_embeddings": False}),
    "gemma3_text": ("gemma3_text", {**sliding("ssf"), "query_pre_attn_scalar": 12}),
    "phi3": ("phi3", {"sliding_window": OWN}),
    "phi3, short": ("phi3", phi3(original=128)),
    "phi3, long": ("phi3", phi3(original=16)),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", sliding("sf")),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, mixed": ("smollm3", {**sliding("fs"), "use_sliding_window": True, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0}),
    "granitemoe": (
        "granitemoe",
        {"attention_multiplier": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    ),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {"attention_bias": False}),
    "cohere": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": ("cohere2", sliding("sf")),
    "starcoder2": ("starcoder2", {"sliding_window": OWN}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "stablelm, all options": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    "phi": ("phi", {"qk_layernorm": True}),
    "falcon, multi-query": ("falcon", {}),
    "falcon, multi-head": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox, in turn": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 3}),
    "gpt2, not scaled": ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}),
}
every_row = pytest.mark.parametrize("row", ROWS)
# Of each architecture the first row; the others differ in options that the tests of whole and short windows hold.
_FIRST = list({model_type: row for row, (model_type, _) in reversed(ROWS.items())}.values())
first_rows = pytest.mark.parametrize("row", some(list(ROWS), _FIRST))


def build(row: str, **others):
    """A tiny model of a row and other options, the caller's own: conversion uses its teacher up."""
    return copy.deepcopy(_built(row, **others))


@cache
def _built(row: str, **others):
    model_type, changes = ROWS[row]
    torch.manual_seed(0)
    own = {key: value for key, value in SMALL.items() if model_type != "falcon" or key != "head_dim"}
    config = AutoConfig.for_model(model_type, **{**own, **changes, **others})
    # Only this implementation caps scores.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if "gemma2" in row else "sdpa").eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1, which would hide their loss
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def convert(row: str, mixers=None):
    teacher = build(row)
    everything = [MixerConfig(layers=list(range(teacher.config.num_hidden_layers)), window=max(LENGTHS))]
    return LinearizedForCausalLM.from_teacher(teacher, mixers or everything)


def text(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 97, (1, length), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[rows, longest]`."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        real = slice(0, row.shape[1]) if side == "right" else slice(longest - row.shape[1], longest)
        ids[number, real], mask[number, real] = row[0], 1
    return ids, mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@torch.no_grad()
@every_row
def test_a_window_over_everything_is_the_teacher(row):
    teacher, model, rows = build(row), convert(row), text(*LENGTHS)
    expected = [teacher(ids).logits for ids in rows]
    for ids, logits in zip(rows, expected, strict=True):
        close(model(ids).logits, logits)
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        found = model(ids, attention_mask=mask).logits
        for number, logits in enumerate(expected):
            close(found[number][mask[number] > 0], logits[0])
    first = max(LENGTHS) - 12
    out = model(rows[0][:, :first], use_cache=True)
    pieces = [out.logits]
    for token in rows[0][:, first:].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    close(torch.cat(pieces, 1), expected[0])


@torch.no_grad()
@first_rows
def test_it_generates_what_the_teacher_does(row):
    teacher, model, rows = build(row), convert(row), text(*PROMPTS)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = [teacher.generate(ids, **settings)[:, ids.shape[1] :] for ids in rows]
    assert torch.equal(model.generate(rows[0], **settings)[:, PROMPTS[0] :], expected[0])
    ids, mask = padded(rows, "left")
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[:, max(PROMPTS) :], torch.cat(expected))


@torch.no_grad()
@every_row
def test_a_short_window_is_the_teacher_under_a_mask(row):
    teacher, (ids,) = build(row), text(LENGTHS[0])
    layers = family_of(teacher.config).layers(teacher.config)
    model = convert(row, mixers_for(MixerSpec(window=WINDOW, sinks=SINKS), layers))
    token = torch.arange(LENGTHS[0])
    causal = token <= token[:, None]
    bare = causal & (token > token[:, None] - OWN)
    short = causal & ((token > token[:, None] - WINDOW) | (token < SINKS))
    assert all(layer.window in (None, OWN) for layer in layers)
    short, bare = (torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None] for seen in (short, bare))
    mixed = len({layer.window for layer in layers}) > 1
    mask = {"full_attention": short, "sliding_attention": bare} if mixed else short
    expected = teacher(ids, attention_mask=mask).logits
    close(model(ids).logits, expected)
    assert (expected - teacher(ids).logits).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
@first_rows
def test_landmarks_in_pieces_are_the_whole(row):
    layers = family_of(build(row).config).layers(build(row).config)
    spec = MixerSpec(window=WINDOW, sinks=SINKS, landmarks=8)
    if all(layer.window is not None for layer in layers):
        with pytest.raises(RecipeError, match="so none has landmarks"):
            mixers_for(spec, layers)
        return
    model = convert(row, mixers_for(spec, layers))
    for name, parameter in model.named_parameters():
        if name.endswith("mix_weight"):
            parameter.data.fill_(0.3)
    (ids,) = text(LENGTHS[0])
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    for piece in ids.split([40, 6, 1, 1, 1, 1, 10], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    close(torch.cat(pieces, 1), whole)


@torch.no_grad()
@every_row
def test_a_batch_of_whole_rows_is_its_rows_one_by_one(row):
    layers = family_of(build(row).config).layers(build(row).config)
    model = convert(row, mixers_for(MixerSpec(recurrence="none", window=WINDOW, sinks=SINKS), layers))
    ids = torch.cat(text(LENGTHS[0], LENGTHS[0]))
    close(model(ids).logits, torch.cat([model(one).logits for one in ids[:, None]]))


@first_rows
def test_it_saves_reloads_and_learns(row, tmp_path):
    build(row).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    family = family_of(teacher.config)
    mixers = mixers_for(MixerSpec(window=WINDOW, sinks=SINKS), family.layers(teacher.config))
    model, (ids,) = LinearizedForCausalLM.from_teacher(teacher, mixers), text(LENGTHS[1])
    model.save_pretrained(tmp_path / "converted")
    again = LinearizedForCausalLM.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    model(ids, labels=ids).loss.backward()
    for attention in model.modules():
        if isinstance(attention, LinearizedAttention):
            for name in {family.projections[short].split(".")[-1] for short in ("q", "k", "v")}:
                module = attention.get_submodule(name)
                gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
                assert bool(gradient.any(1).all()), name


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CROSSING = {
    "longrope": ("phi3", phi3(original=40)),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 40}),
    "dynamic, partial": (
        "stablelm",
        {"rope_parameters": {**DYNAMIC, "partial_rotary_factor": 0.5}, "max_position_embeddings": 40},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CROSSING)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_positions_that_depend_on_the_length_are_one_function_once_converted(kind, window, tmp_path):
    ROWS[f"crossing {kind}"] = CROSSING[kind]
    teacher, ids = build(f"crossing {kind}"), torch.cat(text(LENGTHS[0], LENGTHS[0]))
    del ROWS[f"crossing {kind}"]
    everything = MixerConfig(layers=[0, 1], window=window or LENGTHS[0], sinks=SINKS)
    expected = copy.deepcopy(teacher)(ids).logits
    model = LinearizedForCausalLM.from_teacher(teacher, [everything])
    for name, parameter in model.named_parameters():
        if name.endswith("mix_weight"):
            parameter.data.fill_(0.3)
    model.save_pretrained(tmp_path)
    for one in (model, LinearizedForCausalLM.from_pretrained(tmp_path)):
        whole = one(ids, use_cache=False).logits
        if window is None and kind == "longrope":  # beyond the border the teacher takes the same factors
            close(whole, expected)
        close(one(ids[:, :30], use_cache=False).logits, whole[:, :30])
        for sizes in ([1] * LENGTHS[0], [30, 20, 10], [41, 19]):
            cache, pieces = None, []
            for piece in ids.split(sizes, dim=1):
                out = one(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
            close(torch.cat(pieces, 1), whole)
        prompt, settings = ids[:, :30], {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
        written = one.generate(prompt, **settings)
        assert torch.equal(one(written[:, :-1], use_cache=False).logits.argmax(-1)[:, 29:], written[:, 30:])
        assert torch.equal(State.read(one, prompt).generate(one, **settings), written[:, 30:])


@torch.no_grad()
def test_dynamic_positions_are_those_of_the_longest_context():
    ROWS["dynamic"] = CROSSING["dynamic"]
    teacher, (ids,) = build("dynamic"), text(160)  # 4 x 40
    del ROWS["dynamic"]
    expected = copy.deepcopy(teacher)(ids).logits
    model = LinearizedForCausalLM.from_teacher(teacher, [MixerConfig(layers=[0, 1], window=160)])
    close(model(ids).logits, expected)


def test_a_checkpoint_with_two_tables_gets_one_when_it_is_loaded(tmp_path):
    model = convert("phi3, long")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    assert rope["short_factor"] == rope["long_factor"] == [2.0, 5.0]
    rope["short_factor"] = [1.0, 1.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, (ids,) = LinearizedForCausalLM.from_pretrained(tmp_path), text(10)
    close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("gemma3", {}, "vision or audio tower"),
        ("llava", {}, "vision or audio tower"),
        ("mamba", {}, "linear layers already"),
        ("rwkv", {}, "linear layers already"),
        ("qwen3_next", {}, "linear layers already"),
        ("bloom", {}, "not supported; there are: .*falcon"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gemma", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_cannot_be_converted_says_why(model_type, changes, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        family_of(AutoConfig.for_model(model_type, **changes))
    assert "\n" not in str(refused.value)


def test_the_balancing_loss_of_experts_is_the_teachers():
    teacher = build("qwen3_moe")
    layers = list(range(teacher.config.num_hidden_layers))
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), [MixerConfig(layers=layers, window=LENGTHS[0])])
    ids, mask = padded(text(*LENGTHS), "left")
    for more in ({"attention_mask": torch.ones_like(mask)}, {"attention_mask": mask}):
        ours, theirs = (m(ids, labels=ids, output_router_logits=True, **more) for m in (model, teacher))
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
        torch.testing.assert_close(ours.loss, theirs.loss)
    with pytest.raises(ValueError, match="packed rows"):
        model(ids, position_ids=(torch.arange(ids.shape[1]) % 30)[None], output_router_logits=True)
