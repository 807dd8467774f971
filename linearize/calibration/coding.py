"""`mixer.memory_dtype` int8 and int4: how a layer scales and shifts the channels of its keys before they are coded.

Some channels of a key hardly change from token to token and are a hundred times larger than what tells keys apart:
biases in channels that turn slowly with the position (Qwen2.5-0.5B). A code would spend its range on them. Scores
of softmax attention do not depend on

    shift    one vector for all keys: it moves all scores of a query alike. The mean key is taken away
    scale    of a channel, if queries are divided by it (SmoothQuant, arXiv 2211.10438). An error of the codes is
             alike in all channels and a query weighs it, so the sum of its squares over channels is least for
             scale^2 = spread of queries / spread of keys
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from linearize_kernels.codes import rounded

from linearize.errors import RecipeError
from linearize.model.precision import slot_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from linearize.families.base import Projections
    from linearize.model import LinearizedForCausalLM, MixerConfig

LENGTH = 2048
"""Tokens of the text, unless the model has fewer positions."""
_LEAST = 1e-3  # of the mean spread of a head's channels
_MOST_LOST = 0.1


@torch.no_grad()
def fit_coding(
    model: LinearizedForCausalLM, sections: Mapping[int, MixerConfig], ids: Tensor
) -> dict[int, dict[str, Tensor]]:
    """`key_scale` and `key_shift` of mixers, `[K, D]` each, by layer.

    Args:
        model: the pretrained model as a `LinearizedForCausalLM` without mixers, in eval mode.
        sections: the mixer sections of layers with landmarks.
        ids: `[L]` token ids of a text.

    Raises:
        RecipeError: a layer has a recurrence, which reads keys as they are, and codes would lose what tells them apart.
    """
    found: dict[int, dict[str, Tensor]] = {}

    def observe(layer: int, section: MixerConfig, new: Projections, _: Tensor | None) -> None:
        attention = model.attention_layers[layer]
        heads = [head for head in range(attention.layer.key_value_heads) if head not in section.softmax_heads]
        chosen = attention.select(new, heads)
        if section.recurrence == "none":
            found[layer] = _fitted(chosen, shifts=attention.layer.softcap is None)
        elif bits := slot_bits(section):
            _check(chosen.k_rotated[0].float(), layer, bits)

    for layer, section in sections.items():
        model.attention_layers[layer].observer = partial(observe, layer, section)
    try:
        model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer in sections:
            model.attention_layers[layer].observer = None
    return found


def _fitted(new: Projections, *, shifts: bool) -> dict[str, Tensor]:
    k = new.k_rotated[0].float()
    q = new.q_rotated[0].float().unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(0, 1)
    mean = k.mean(0) if shifts else torch.zeros_like(k[0])
    of_queries, of_keys = (x.square().mean(0).sqrt() for x in (q, k - mean))
    of_queries, of_keys = (x + _LEAST * x.mean(-1, keepdim=True) + 1e-12 for x in (of_queries, of_keys))
    scale = (of_queries / of_keys).sqrt()
    return {"key_scale": scale, "key_shift": -mean * scale}


def _check(keys: Tensor, layer: int, bits: int) -> None:
    lost = (rounded(keys, bits) - keys).square().sum() / (keys - keys.mean(0)).square().sum().clamp_min(1e-12)
    if float(lost) > _MOST_LOST:
        raise RecipeError(
            f"mixer.memory_dtype: the keys of layer {layer} are so alike that rounding them to {bits} bits loses "
            f"{100 * float(lost):.0f} % of what tells them apart, and a recurrence reads them whole: set "
            "mixer.recurrence: none, or memory_dtype: auto"
        )
