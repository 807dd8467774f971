"""The fingerprint of a model: states, cached evaluation results, teacher logits and self-written text are reused only
for a model with the same fingerprint."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig

from linearize.errors import StateError
from linearize.runtime.memory import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Generation and training settings beside those of `PreTrainedConfig`; none of them changes a model's state.
_NEUTRAL = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range"}


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """`configuration` and `weights` (SHA-256 in hexadecimal) and `dtype` of a causal LM, converted or not, with its
    active adapters.

    The digest covers names, shapes, dtypes and all bits of the weights, so a CPU and a GPU give the same one. Hashing
    538 MB takes 0.5 s on one core with SHA instructions. The digests are cached per `model`; a later call sums the
    tensors' 64-bit words, which takes 0.1 s, and hashes only tensors that were written or replaced since.

    Raises:
        StateError: weights are offloaded.
    """
    unused, scales = _adapters(model)
    # Skip other buffers: they are computed from the configuration, and differ in the last bit between devices.
    tensors = {name: x for name, x in model.state_dict().items() if not f"{name}.".startswith(unused)}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise StateError(f"{name} is offloaded; load the model without offloading")
    kept = _KEPT.setdefault(model, {})
    states = {name: _state(tensor) for name, tensor in tensors.items()}
    changed = {name: x for name, x in tensors.items() if name not in kept or kept[name][0] != states[name]}
    kept.update({name: (states[name], digest) for name, digest in _digests(changed).items()})
    weights = hashlib.sha256()
    named = {n.replace(".base_layer.", ".").replace(".original_module.", "."): kept[n][1] for n in tensors}
    for name, digest in sorted(named.items()):
        weights.update(f"{name} {digest}\n".encode())
    weights.update(json.dumps(scales, sort_keys=True).encode())
    return {
        "configuration": hashlib.sha256(_configuration(model).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
    }


_State = tuple[Any, ...]
_KEPT: WeakKeyDictionary[PreTrainedModel, dict[str, tuple[_State, str]]] = WeakKeyDictionary()
"""Model -> name -> digest of the tensor, and the tensor's `_state` at the time."""
_FOLD = 4093
"""Each word's weight is its index modulo this prime, because no usual row width is a multiple of it."""


def _state(tensor: Tensor) -> _State:
    """Numbers that change when the tensor is replaced or written."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // 8 * 8
    words = octets[:whole].view(torch.int64)
    folded = words.numel() // _FOLD * _FOLD
    sums = words[:folded].view(-1, _FOLD).sum(0)
    sums[: words.numel() - folded] += words[folded:]
    # `_version` misses fused optimizers and writes through `.data`; the sum of 64-bit words detects those. Weights by
    # index detect swapped rows.
    total = (sums * torch.arange(1, 2 * _FOLD, 2, device=sums.device)).sum() + octets[whole:].sum()
    return _place(tensor), -1 if tensor.is_inference() else tensor._version, int(total)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> shape, dtype and SHA-256 of all bytes; a tied tensor is hashed once."""
    different = {_place(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashlib releases the GIL
        found = dict(zip(different, threads.map(digest_of, different.values()), strict=True))
    return {name: f"{tuple(x.shape)} {x.dtype} {found[_place(x)].hex()}" for name, x in tensors.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _configuration(model: PreTrainedModel) -> str:
    config: Any = model.config
    converted = config.model_type == "linearized"
    base = config.text_config if converted else config
    # Hash only the settings that differ from the defaults, because a later transformers may add settings.
    neutral = _NEUTRAL | PreTrainedConfig().to_dict().keys()
    settings = {name: value for name, value in base.to_diff_dict().items() if name not in neutral}
    described = {"model_type": base.model_type, "settings": settings, "mixers": config.mixers if converted else None}
    return json.dumps(described, sort_keys=True, default=str)


def _adapters(model: nn.Module) -> tuple[tuple[str, ...], dict[str, float]]:
    """peft adapters: prefixes of tensors that no active adapter uses, and the scale of each active adapter."""
    unused, scales = [], {}
    for path, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "adapter_layer_names"):
            continue
        # A merged adapter is part of the base weight.
        silent = layer.disable_adapters or getattr(layer, "merged", False)
        active = [] if silent else list(layer.active_adapters)
        for kind in layer.adapter_layer_names:
            for name in getattr(layer, kind, ()):
                if name in active:
                    scales[f"{path} {name}"] = float(getattr(layer, "scaling", {}).get(name, 1.0))
                else:
                    unused.append(f"{path}.{kind}.{name}.")
    return tuple(unused), scales


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, rules, special tokens, chat template and settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        for passing in ("padding", "truncation"):  # the previous call's settings
            rules.pop(passing, None)
    settings = [tokenizer.model_max_length, getattr(tokenizer, "add_bos_token", 0), tokenizer.chat_template]
    parts = [rules, tokenizer.special_tokens_map, *settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
