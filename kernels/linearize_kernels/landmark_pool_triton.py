"""Launch the kernels before and after those that read a text with landmarks: one makes the pool, one keeps its tokens.

`linearize.model.landmarks.chunks` is the same in plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linearize_kernels.dispatch import power_of_2
from linearize_kernels.landmark_pool_kernel import landmark_keep_kernel, landmark_pool_kernel
from linearize_kernels.landmark_text_triton import operand_of, pieces_of
from linearize_kernels.landmark_triton import HELD, held_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linearize_kernels.landmark_text_triton import Chosen, LandmarkText

_TILE, _LEAST = 32, 16  # tokens per program, and the least side of a product of tensor cores


class Pool(NamedTuple):
    """Keys and values `[R, S, K, D or V]` as `pooled` makes them, and with a learned score its inputs
    `[R, L, K (D + V)]` float32."""

    keys: Tensor
    values: Tensor
    inputs: Tensor | None


def launch_landmark_pool(
    text: LandmarkText,
    parts: Mapping[str, Mapping[str, Tensor]],
    k_rotated: Tensor,
    v: Tensor,
    k: Tensor,
    *,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    learned: bool,
) -> Pool:
    """Lay out the tokens of sinks, slots and text, and of the text as slots in 4 bits store them.

    Args:
        parts: the memory of a layer.
        k_rotated, v, k: `[R, L, K, D or V]` of the new tokens, not rounded.
        key_scale, key_shift: `[K, D]`, of keys before they are coded.
        learned: return the inputs of a learned score.
    """
    k_rotated, v, k = (_by_token(x) for x in (k_rotated, v, k))
    (rows, tokens, groups, width), values = k_rotated.shape, v.shape[3]
    operand, slots = operand_of(text.q), parts["landmarks"]
    pieces = pieces_of(v.dtype if slots["v"].dtype == v.dtype else torch.float32, text.q)
    leaving = text.merges * text.block if text.ahead else 0
    whole = text.sinks + text.slots + text.places + leaving

    def empty(*shape: int, dtype: torch.dtype = operand) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=v.device)

    pool = Pool(
        empty(whole, groups, pieces * width),
        empty(whole, groups, pieces * values),
        empty(tokens, groups * (width + values), dtype=torch.float32) if learned else None,
    )
    sizes = (text.sinks, text.slots, text.places, leaving)
    tiles = sum(-(-size // _TILE) for size in sizes)
    absent = pool.keys  # a placeholder pointer that the kernel does not read
    with torch.cuda.device_of(v):  # Triton launches on the current device
        landmark_pool_kernel[(rows * tiles, groups, 2)](
            k_rotated,
            v,
            k,
            *(absent if x is None else x for x in (key_scale, key_shift, pool.inputs)),
            pool.keys,
            pool.values,
            *_memory(parts, absent),
            text.before,
            text.offset,
            *(x.stride(i) for x in (k_rotated, v, k) for i in (0, 1)),
            *_rows_of(parts, width),
            tokens,
            text.places,
            text.slots,
            leaving,
            tiles,
            CODED=key_scale is not None,
            LEARNED=learned,
            **_shared(text, parts, pool, width, values),
        )
    return pool


def launch_landmark_keep(
    text: LandmarkText,
    parts: Mapping[str, Mapping[str, Tensor]],
    pool: Pool,
    chosen: Chosen,
    novelty: Tensor,
    *,
    width: int,
    values: int,
) -> None:
    """Write sinks, window and slots after a text into the memory `parts`; places without a token become 0.

    Args:
        chosen: with what `launch_landmark_choose` has found.
        novelty: `[R, P, K]` float32, the static scores of the text.
        width, values: D and V.
    """
    novelty = novelty if novelty.stride()[1:] == (novelty.shape[2], 1) else novelty.contiguous()
    rows, _, groups = novelty.shape
    room = text.window + text.block - 1
    tiles = sum(-(-size // _TILE) for size in (text.sinks, room, text.slots))
    absent, window, slots = pool.keys, parts["window"], parts["landmarks"]
    with torch.cuda.device_of(novelty):
        landmark_keep_kernel[(rows * tiles, groups, 2)](
            pool.keys,
            pool.values,
            chosen.table,
            novelty,
            chosen.received,
            chosen.novelty,
            chosen.number,
            *_memory(parts, absent, *held_of(window, absent, "novelty", "received")),
            *held_of(slots, absent, "novelty", "received", "number"),
            text.before,
            text.offset,
            absent if text.total is None else text.total,
            pool.keys.stride(0),
            pool.values.stride(0),
            novelty.stride(0),
            *_rows_of(parts, width),
            text.first + text.q.shape[1],
            text.places,
            text.slots,
            text.merges,
            W=text.window,
            HAS_TOTAL=text.total is not None,
            **_shared(text, parts, pool, width, values),
        )


def _memory(parts: Mapping[str, Mapping[str, Tensor]], absent: Tensor, *scores: Tensor) -> list[Tensor]:
    """The tokens of sinks, window and slots; `scores` are those of the window."""
    found = [held_of(parts.get("sinks", {}), absent, *HELD), held_of(parts["window"], absent, *HELD)]
    return [*found[0], *found[1], *scores, *held_of(parts["landmarks"], absent, *HELD)]


def _rows_of(parts: Mapping[str, Mapping[str, Tensor]], width: int) -> list[int]:
    """Tokens and heads between the rows of sinks, window and slots."""
    sinks, window, slots = (parts.get(name, {}).get("k_rotated") for name in ("sinks", "window", "landmarks"))
    assert window is not None and slots is not None  # noqa: S101 - for the type checker
    first = 0 if sinks is None else sinks.stride(0) // width
    return [first, window.stride(0) // width, slots.stride(0) // slots.shape[3]]


def _shared(
    text: LandmarkText, parts: Mapping[str, Mapping[str, Tensor]], pool: Pool, width: int, values: int
) -> dict[str, Any]:
    """The constants of both kernels."""
    slots, bits = parts["landmarks"], {torch.int8: 8, torch.uint8: 4}
    return {
        "K": pool.keys.shape[2],
        "D": width,
        "V": values,
        "SINKS": text.sinks,
        "BLOCK": text.block,
        "NEAR_BITS": bits.get(parts["window"]["v"].dtype, 0),
        "SLOT_BITS": bits.get(slots["v"].dtype, 0),
        "RAGGED": isinstance(text.before, Tensor),
        "PIECES": pool.keys.shape[3] // width,
        "WHOLE": pool.keys.dtype == torch.float32,
        "BLOCK_H": max(power_of_2(width // 2), _LEAST),
        "BLOCK_U": max(power_of_2(values // 2), _LEAST),
        "BLOCK_N": _TILE,
        "num_warps": 8 if max(width, values) * pool.keys.element_size() > 256 else 4,
        "enable_fp_fusion": True,
    }


def _by_token(x: Tensor) -> Tensor:
    """`x` `[R, L, heads, width]` with the heads of a token side by side."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()
