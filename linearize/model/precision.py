"""Parts of a memory whose keys and values are stored in 8 or 4 bits.

A part then holds codes under a tensor's name, and their scales beside it (`k_rotated`, `k_rotated_scale`). Every reader
of a token sees what is stored, also the token itself: keys and values are rounded as soon as they are projected, so
nothing depends on how a text is split into calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from linearize_kernels.codes import Codes, decode, encode, room_for_codes, rounded
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part

_SCALE = "_scale"


def slot_bits(config: MixerConfig) -> int:
    """Bits of a channel in the slots of landmarks; 0 means the dtype of the model."""
    return {"auto": 0, "int8": 8, "int4": 4}[config.memory_dtype]


def exact_bits(config: MixerConfig) -> int:
    """Bits of a channel in window and sinks; 0 means the dtype of the model."""
    return 0 if config.memory_dtype == "auto" else 8


def empty_slots(
    layer: AttentionLayer,
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    bits: int = 0,
) -> Part:
    """Room for N keys or, with the name `v`, values, as the tensors of a part: `[B, N, K, D or V]` in `dtype`, or their
    codes. It is not initialised; `clear` makes it zeros.

    Raises:
        ValueError: the width of a head does not go with the bits.
    """
    width = layer.value_width if name == "v" else layer.key_width
    whole = (*shape, layer.key_value_heads, width)
    if bits:
        return _as_part(name, room_for_codes(whole, bits, device))
    return {name: torch.empty(whole, dtype=dtype, device=device)}


def names_in_part(names: Sequence[str], bits: int) -> tuple[str, ...]:
    """The names of the tensors that a part has for these."""
    endings = ("", _SCALE) if bits else ("",)
    return tuple(name + ending for name in names for ending in endings)


def as_read(part: Part, name: str, count: int | None = None) -> Tensor | Codes:
    """The first `count` tokens of a part's tensor (None: all), as `step_attention` and `joint_attention` take it."""
    held, scale = part[name][:, :count], part.get(name + _SCALE)
    return held if scale is None else Codes(held, scale[:, :count])


def decoded(part: Part, dtype: torch.dtype) -> Part:
    """The tensors of a part, codes decoded in `dtype`."""
    values: Part = {}
    for name in part:
        if not name.endswith(_SCALE):
            held = as_read(part, name)
            values[name] = decode(held, dtype) if isinstance(held, Codes) else held
    return values


def encoded(values: Part, like: Part) -> Part:
    """Tensors as the part `like` stores them."""
    coded = [name for name in values if name + _SCALE in like]
    if not coded:
        return values
    held = {name: tensor for name, tensor in values.items() if name not in coded}
    tensors, bits = [values[name].detach() for name in coded], 4 if like[coded[0]].dtype == torch.uint8 else 8
    if len({tensor.shape for tensor in tensors}) > 1:
        found = [encode(tensor, bits) for tensor in tensors]
    else:
        # One call for keys and values, because a step's tensors are so small that each launch counts.
        whole = encode(torch.stack(tensors), bits)
        found = [Codes(*(x[place] for x in whole)) for place in range(len(coded))]
    for name, codes in zip(coded, found, strict=True):
        held |= _as_part(name, codes)
    return held


def rounded_part(values: Part, bits: int) -> Part:
    """Keys, values and gate inputs of a part as they are decoded again; other tensors unchanged."""
    return {n: rounded(x, bits) if n in ("k", "k_rotated", "source", "v") else x for n, x in values.items()}


def _as_part(name: str, held: Codes) -> Part:
    return {name: held.codes, name + _SCALE: held.scale}
