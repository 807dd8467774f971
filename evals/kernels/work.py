"""What is measured, and the bytes and floating-point operations that it cannot do without.

Bytes are those that have to cross the chip's border if nothing is fetched twice: inputs once in, results once out.
FLOPs are those of the matrix products, a multiply-add counting 2, causal halves counted as halves. What a kernel does
beyond that is its own affair, and shows as a smaller share of the roof.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a chunk, inside which the recurrence is a product of pairs; as in the kernels.
CHUNK = 64
# FlashAttention's own convention: five products where the forward pass has two.
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
        """What a machine that does nothing else needs: the longer of moving and multiplying."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def pairs_of_window(tokens: int, window: int, sinks: int) -> int:
    """Query-key pairs of one head over a text: the last W tokens, and sinks once they have left the window."""
    whole = min(tokens, window)
    pairs = whole * (whole + 1) // 2 + (tokens - whole) * window
    return pairs + sum(max(tokens - window - sink, 0) for sink in range(sinks))


def forward(shape: Shape, length: int, rows: int, item: int, *, recurrence: bool, causal: bool = False) -> Work:
    """A pass over `rows` texts of `length` tokens with elements of `item` bytes.

    Args:
        recurrence: whether there is one beside the window, with its own queries and keys (those without positions).
        causal: full attention in the place of the window.
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
    """The gradients of all inputs: these and the output's gradient in, theirs out."""
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
