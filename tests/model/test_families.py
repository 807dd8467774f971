"""Every family, on a tiny random model: nothing of the architecture is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.model import LinearizedForCausalLM, MixerConfig

TOKENS = 60
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
ROWS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3.1 positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"use_sliding_window": False}),
}  # fmt: skip


def build(row: str):
    model_type, changes = ROWS[row]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **changes})).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1, which would hide their loss
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_identity_and_masked_teacher(row):
    teacher = build(row)
    ids = torch.randint(2, 97, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    expected = teacher(ids).logits
    for window, sinks in ((TOKENS, 0), (12, 3)):
        mixer = MixerConfig(layers=[0, 1], window=window, sinks=sinks)
        model = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), [mixer])
        token = torch.arange(TOKENS)
        seen = (token <= token[:, None]) & ((token > token[:, None] - window) | (token < sinks))
        masked = teacher(ids, attention_mask=seen.expand(2, 1, -1, -1)).logits
        close(model(ids).logits, masked)
        if window == TOKENS:
            close(masked, expected)
            plain = teacher.generate(ids[:, :20], max_new_tokens=20, do_sample=False, pad_token_id=0)
            assert torch.equal(model.generate(ids[:, :20], max_new_tokens=20, do_sample=False, pad_token_id=0), plain)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 32}, "sliding-window layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, "sliding-window layers"),
        ("gpt2", {}, "not supported"),
    ],
)
def test_what_cannot_be_converted_says_why(model_type, changes, reason):
    small = {} if model_type == "gpt2" else SMALL
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **changes}))
    with pytest.raises(ValueError, match=reason):
        LinearizedForCausalLM.from_teacher(teacher, [MixerConfig(layers=[0])])
