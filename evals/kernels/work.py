"""The minimum of bytes and floating-point operations of each measured call.

Bytes are those between memory and chip if nothing is transferred twice: inputs read once, results written once. FLOPs
are those of the matrix products, with a multiply-add as 2 and causal halves as halves. Any work of a kernel beyond that
lowers its share of the roof.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a chunk, inside which the recurrence is a product of pairs; as in the kernels.
CHUNK = 64
# FlashAttention's convention: the backward pass has five products, the forward pass two.
BACKWARD = 2.5


@dataclass(frozen=True)
class Shape:
    """A layer's heads (H, K, D = V), its window W and its sinks M."""

    name: str
    query_heads: int
    key_value_heads: int
    width: int
    window: int
    sinks: int = 4

    @property
    def group(self) -> int:
        return self.query_heads // self.key_value_heads


SHAPES = {shape.name: shape for shape in (Shape("llama-3-8b", 32, 8, 128, 64), Shape("smollm2", 9, 3, 64, 64))}
# Those of estimates: also heads of 256 channels, and as many key/value heads as query heads.
ESTIMATED = SHAPES | {shape.name: shape for shape in (Shape("gemma", 8, 4, 256, 64), Shape("mha", 32, 32, 128, 64))}
LENGTHS = (2_048, 8_192, 32_768)
TOKENS = 32_768
STEP_BATCHES = (1, 16, 64)
DRY_SHAPES = {"tiny": Shape("tiny", 4, 2, 16, 8, 2)}
DRY_LENGTHS, DRY_TOKENS, DRY_STEP_BATCHES = (16, 32), 32, (1, 2)


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one call."""

    bytes: int
    flops: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The minimum time of a machine with these rates: the longer of transfer and computation."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def pairs_of_window(tokens: int, window: int, sinks: int) -> int:
    """Query-key pairs of one head over a text: the last W tokens, and sinks once they have left the window."""
    whole = min(tokens, window)
    pairs = whole * (whole + 1) // 2 + (tokens - whole) * window
    return pairs + sum(max(tokens - window - sink, 0) for sink in range(sinks))


def forward(shape: Shape, length: int, rows: int, item: int, *, recurrence: bool, causal: bool = False) -> Work:
    """A pass over `rows` texts of `length` tokens with elements of `item` bytes.

    Args:
        recurrence: True if there is one beside the window, with its own queries and keys (without positions).
        causal: full attention instead of the window.
    """
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.width
    inputs = (1 + recurrence) * (heads + groups) * width + groups * width
    moved = rows * length * (inputs + heads * width) * item
    pairs = length * (length + 1) // 2 if causal else pairs_of_window(length, shape.window, shape.sinks)
    flops = rows * heads * pairs * 4 * width
    if recurrence:
        chunks, rest = divmod(length, CHUNK)
        inside = chunks * CHUNK * (CHUNK + 1) // 2 + rest * (rest + 1) // 2
        per_pair, per_state = 2 * (2 * width + 1), 2 * width * (width + 1)
        flops += rows * (heads * inside * per_pair + length * (heads + groups) * per_state)
    return Work(moved, flops)


def backward(shape: Shape, length: int, rows: int, item: int, *, recurrence: bool, causal: bool = False) -> Work:
    """The gradients of all inputs: inputs and the output's gradient read, their gradients written."""
    ahead = forward(shape, length, rows, item, recurrence=recurrence, causal=causal)
    outputs = rows * length * shape.query_heads * shape.width * item
    return Work(2 * (ahead.bytes - outputs) + outputs, int(BACKWARD * ahead.flops))


def step(shape: Shape, batch: int, item: int) -> Work:
    """One token per row with window and sinks full, state in float32: read, decayed, written and read by each query."""
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.width
    kept = groups * (shape.window + shape.sinks) * 2 * width * item
    exchanged = 2 * groups * 3 * width * item  # k with and without positions, and v: one token out, one in
    state = groups * width * (width + 1)
    fresh = (2 * (heads + groups) + groups) * width * item + heads * width * 4
    flops = heads * (shape.window + shape.sinks) * 4 * width + state * (3 + 2 * shape.group)
    return Work(batch * (kept + exchanged + 2 * state * 4 + fresh), batch * flops)


def causal_step(shape: Shape, batch: int, length: int, item: int) -> Work:
    """One token per row over a cache of `length` tokens."""
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.width
    moved = (length * groups * 2 + 2 * heads) * width * item
    return Work(batch * moved, batch * heads * length * 4 * width)
