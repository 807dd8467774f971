"""What tells one model from another: a memory means nothing to any model but the one that wrote it, and results of an
evaluation are kept under the model that they are of."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from linearize.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_SAMPLES = 256
# Settings of generation and training, on top of what any configuration has: none of them changes a memory.
_NEUTRAL = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range"}


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """`configuration` and `weights`, SHA-256 in hexadecimal, and `dtype`, of a causal LM, converted or not, with the
    adapters active on it.

    Weights count with their names, shapes and dtypes, the sum of all their bits (which any one change alters) and an
    evenly spaced sample of them. All of it is exact, so a CPU and a GPU agree; it takes one pass over the weights.

    Raises:
        StateError: weights are offloaded, so that they are not at hand.
    """
    weights = hashlib.sha256()
    unused, scales = _adapters(model)
    # What a checkpoint holds; other buffers are worked out from the configuration, and not to the last bit.
    for name, tensor in sorted(model.state_dict().items()):
        if f"{name}.".startswith(unused):
            continue
        if tensor.is_meta:
            raise StateError(f"{name} is offloaded; load the model without offloading")
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        weights.update(telling_bits(tensor))
    weights.update(json.dumps(scales, sort_keys=True).encode())
    return {
        "configuration": hashlib.sha256(_configuration(model).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
    }


def _configuration(model: PreTrainedModel) -> str:
    config: Any = model.config
    converted = config.model_type == "linearized"
    base = config.text_config if converted else config
    # Only what differs from the defaults: a later transformers may know more settings.
    neutral = _NEUTRAL | PreTrainedConfig().to_dict().keys()
    settings = {name: value for name, value in base.to_diff_dict().items() if name not in neutral}
    described = {"model_type": base.model_type, "settings": settings, "mixers": config.mixers if converted else None}
    return json.dumps(described, sort_keys=True, default=str)


def telling_bits(tensor: Tensor) -> bytes:
    """The sum of all bits of `tensor`, and an evenly spaced sample of them."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // 8 * 8
    words = octets[:whole].view(torch.int64)
    sample = words[:: max(1, words.numel() // _SAMPLES)]
    picked: bytes = torch.cat([sample, words.sum()[None]]).cpu().numpy().tobytes()
    rest: bytes = octets[whole:].cpu().numpy().tobytes()
    return picked + rest


def _adapters(model: nn.Module) -> tuple[tuple[str, ...], dict[str, float]]:
    """Of peft: the prefixes of tensors that no active adapter uses, and the scale of each adapter that is active."""
    unused, scales = [], {}
    for path, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "adapter_layer_names"):
            continue
        silent = layer.disable_adapters or getattr(layer, "merged", False)  # merged: it is in the base weight
        active = [] if silent else list(layer.active_adapters)
        for kind in layer.adapter_layer_names:
            for name in getattr(layer, kind, ()):
                if name in active:
                    scales[f"{path} {name}"] = float(getattr(layer, "scaling", {}).get(name, 1.0))
                else:
                    unused.append(f"{path}.{kind}.{name}.")
    return tuple(unused), scales
