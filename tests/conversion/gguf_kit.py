"""Tiny models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Heads wide enough for turns of all speeds.
_SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "num_hidden_layers": 2, "max_position_embeddings": 16_384, "vocab_size": len(TOKENS), "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, always the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Sequence[float]] | None = None,
    *,
    without: Sequence[str] = (),
) -> Path:
    """Writes `model` with a tokenizer of single bytes.

    Args:
        keys: added; names that begin with `rope.` belong to the architecture.
        tensors: added, in float32.
        without: keys that the converter writes and the file lacks.
    """
    config: Any = model.config
    arch = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stated = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.attention.key_length": width,
        f"{arch}.attention.value_length": width,
        f"{arch}.rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.chat_template": CHATML,
    }
    if getattr(config, "sliding_window", None):
        stated[f"{arch}.attention.sliding_window"] = config.sliding_window
    added = {f"{arch}.{key}" if key.startswith("rope.") else key: value for key, value in (keys or {}).items()}
    for key, value in {**stated, **added}.items():
        if key not in without:
            _add(writer, key, value)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    for name, tensor in _weights(model, arch).items():
        writer.add_tensor(name, tensor)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _weights(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    config: Any = model.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        base, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        if arch == "llama" and (count := heads.get(base.rpartition(".")[2])):
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and "norm" in base:
            values = values + 1
        if not (base == "lm_head" and config.tie_word_embeddings):
            found[f"{names.get_name(base)}.{suffix}"] = np.ascontiguousarray(values)
    return found
