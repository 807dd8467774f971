"""The objective `align`: each layer alone is trained to reproduce the output of the teacher's attention.

The teacher runs once. Every converted layer then gets the hidden states of the teacher's layer as its input, so errors
and gradients do not cross layers. There are two losses, one after the other:

    beyond   the recurrence alone against the teacher's softmax over the tokens beyond window and sinks,
             renormalised:  Σ_s p_ts v_s / Σ_s p_ts  over sinks < s <= t - W
    whole    the layer's output against the output of the teacher's attention, both after W_o

The first one is needed because the window alone can lower the second: a recurrence that starts at 0 would stay at 0.
Layers with landmarks have the second one only, because their state's tokens are chosen while the text is read.

Both are the squared error divided by the squared target, so a layer with output 0 has a loss of 1. The ratio is taken
per row and averaged over rows, so the loss and the gradients of a step do not depend on its split into batches and
processes. A row whose target is 0 (no document is longer than window and sinks) counts with a loss of 0.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from linearize_kernels import full_attention, window_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize.errors import RecipeError
from linearize.families import family_of
from linearize.families.base import Projections
from linearize.model.attention import CACHE_NAMES, LinearizedAttention, layout_of
from linearize.model.layout import layer_mask, segments_of
from linearize.sources.documents import documents_apart
from linearize.training.windows import exact_reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from linearize.families.base import AttentionLayer
    from linearize.model import LinearizedForCausalLM
    from linearize.model.mixer.mixer import Mixer

_TINY = 1e-12


class _Call(NamedTuple):
    """Arguments and outputs of one call of a teacher's attention."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


class Alignment:
    """The losses of a student's converted layers against its teacher's layers.

    Args:
        student: the converted model, with or without adapters; only its attention layers run.
        length: tokens of a training row.
        checkpointing: recompute a layer's activations in the backward pass.

    Raises:
        RecipeError: rows are so short that no token is beyond window and sinks.
    """

    def __init__(
        self, student: LinearizedForCausalLM, teacher: PreTrainedModel, length: int, *, checkpointing: bool = False
    ) -> None:
        self.teacher, self.checkpointing = teacher, checkpointing
        owners = family_of(teacher.config).attention_modules(teacher)
        pairs = zip(student.attention_layers, (getattr(*owner) for owner in owners), strict=True)
        self.pairs: list[tuple[LinearizedAttention, nn.Module]] = [p for p in pairs if p[0].mixer is not None]
        self.recurrent = [p for p in self.pairs if p[0].mixer is not None and _has_a_share(p[0].mixer)]
        reach = min((exact_reach(layer.mixer) for layer, _ in self.recurrent if layer.mixer is not None), default=0)
        if self.recurrent and length <= reach:
            raise RecipeError(
                f"objective align: rows of {length:,} tokens have nothing beyond window and sinks ({reach:,} tokens); "
                "raise the stage's length"
            )

    def losses(self, input_ids: Tensor, position_ids: Tensor, *, beyond: bool) -> Tensor:
        """`[B]`: the mean over layers of one of the two losses, for each of the packed rows `[B, T]`."""
        rows, tokens = input_ids.shape
        mask = layer_mask(segments_of(None, position_ids, rows, tokens, continued=False), input_ids.device)
        return self.losses_of(input_ids, position_ids, mask, documents_apart(self.teacher, position_ids), beyond=beyond)

    def losses_of(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        mask: Tensor,
        apart: dict[str, Tensor],
        *,
        beyond: bool,
    ) -> Tensor:
        """`losses` with the student's mask, and the arguments that separate the teacher's documents."""
        pairs = self.recurrent if beyond and self.recurrent else self.pairs
        with torch.no_grad(), _recorded([attention for _, attention in pairs]) as calls:
            self.teacher.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **apart)
        layer_loss = _beyond if pairs is self.recurrent and beyond else _whole
        losses = []
        for (layer, attention), call in zip(pairs, calls, strict=True):
            if self.checkpointing:
                losses.append(checkpoint(layer_loss, layer, attention, call, mask, use_reentrant=False))
            else:
                losses.append(layer_loss(layer, attention, call, mask))
        return torch.stack(losses).mean(0)


def _has_a_share(mixer: Mixer) -> bool:
    """True if the recurrence has a defined set of tokens: all, or all that window and sinks do not reach."""
    return mixer.recurrence is not None and not mixer.config.landmarks


@contextmanager
def _recorded(attentions: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """Record the calls of these modules, in their order, while their model runs."""
    calls: dict[int, _Call] = {}
    found: list[_Call] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls[id(module)] = _Call(arguments, keywords, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in attentions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found += [calls[id(module)] for module in attentions]


def _whole(layer: LinearizedAttention, attention: nn.Module, call: _Call, mask: Tensor) -> Tensor:
    """`[B]`: the layer's output (window, recurrence and kept heads) against the teacher's attention."""
    caches = dict.fromkeys(CACHE_NAMES)
    output: Tensor = layer(*call.arguments, **{**call.keywords, **caches, "attention_mask": mask})[0]
    error, size = (x.float().square().sum((1, 2)) for x in (output - call.output, call.output))
    return _relative(error, size)


def _beyond(layer: LinearizedAttention, attention: nn.Module, call: _Call, mask: Tensor) -> Tensor:
    """`[B]`: the recurrence's output alone, against the teacher's attention beyond window and sinks."""
    mixer = layer.mixer
    assert mixer is not None  # noqa: S101 - for the type checker; the caller has looked
    layout = layout_of(mask) if mask.numel() else None
    lengths = None if layout is None else layout.lengths
    hidden: Tensor = call.arguments[0] if call.arguments else call.keywords["hidden_states"]

    def rows(weights: nn.Module | None) -> Projections:
        projected = layer.project(hidden, call.keywords.get("position_embeddings"), weights)
        packed = projected if layout is None else Projections(*(layout.gather(x) for x in projected))
        return layer.select(packed, layer.mixed_heads)

    own = rows(None)
    with torch.no_grad():
        given = rows(attention)
    documents, tokens, first = *own.q.shape[:2], exact_reach(mixer)
    off, mixer.branches_off = mixer.branches_off, frozenset({"window"})
    try:
        read: Tensor = mixer(own, lengths, None)[:, first:].float()
    finally:
        mixer.branches_off = off
    if tokens <= first:
        batch = documents if layout is None else layout.batch
        return read.sum() * read.new_zeros(batch)
    with torch.no_grad():
        target = read_beyond(given, layer.layer, mixer).float()
    # [documents, tokens], then back to the rows that the documents are packed in.
    error, size = (F.pad(x.square().sum((2, 3)), (first, 0)) for x in (read - target, target))
    if layout is not None:
        error, size = layout.scatter(error), layout.scatter(size)
    return _relative(error.sum(1), size.sum(1))


def read_beyond(given: Projections, layer: AttentionLayer, mixer: Mixer) -> Tensor:
    """Softmax attention over the tokens that the recurrence covers, for the queries that have any.

    Args:
        given: rows `[R, L, ...]`.

    Returns:
        `[R, L - first, H, V]`, from query `first` on: window and sinks, or none where the state has every token.
    """
    first, keys = exact_reach(mixer), slice(None)
    own = layer.window
    if mixer.config.covers == "evicted":
        # Without the sinks and shifted by a window, the causal mask again selects the covered keys.
        keys = slice(mixer.config.sinks, given.q.shape[1] - mixer.window)
        own = None if own is None else own - mixer.window
    q, k, v = given.q_rotated[:, first:], given.k_rotated[:, keys], given.v[:, keys]
    if own is None:
        return full_attention(q, k, v, scale=layer.scale, softcap=layer.softcap)
    return window_attention(q, k, v, window=own, scale=layer.scale, softcap=layer.softcap)[0]


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """`error / size` of each row, 0 where there is no target."""
    return torch.where(size > _TINY, error / size.clamp_min(_TINY), 0)
