"""Counts the bytes of every tensor that a training step makes, without data.

The model runs forward and backward on the meta device, which computes no numbers, with the trainer's own loss. The
bytes of a storage count from the operation that makes it until its last reference is gone. So the peak includes what a
layer or the loss needs for a moment, as well as what autograd saves.

`torch.distributed._tools.mem_tracker.MemTracker` (torch 2.13) is not used, because it raises on frozen parameters, does
not tell logits from activations, would replace `_Counter` alone, and gave the same bytes in the one case that it ran
(`sft`, `train: full`); under `FakeTensorMode` the conversion itself fails in `Module.to`.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.evaluation.tasks.hidden import logits_at
from linearize.model.attention import layout_of
from linearize.model.layout import layer_mask, segments_of
from linearize.training.align import Alignment
from linearize.training.objective import TopK, token_losses, top_k_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from linearize.model import LinearizedForCausalLM
    from linearize.recipe import Stage


@dataclass
class Moment:
    """Bytes allocated at one time, besides the models' own weights.

    Attributes:
        logits: tensors as wide as the vocabulary.
        gradients: complete gradients of the trained parameters.
    """

    activations: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradients


class _Counter(TorchDispatchMode):
    """A dispatch mode that counts the bytes of new tensors and keeps the maximum of their sum.

    Args:
        vocabulary: the width of logits.
        known: storages that exist already; they are not counted.
    """

    def __init__(self, vocabulary: int, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.known = vocabulary, known
        self.now, self.fullest = Moment(), Moment()
        self.kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                kind = "logits" if tensor.dim() and tensor.shape[-1] == self.vocabulary else "activations"
                self.count(tensor, kind)
        return made

    def count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        if key not in self.kinds:
            self.kinds[key] = kind, storage.nbytes()
            self._add(kind, storage.nbytes())
            weakref.finalize(storage, self._gone, key).atexit = False
        if self.now.total > self.fullest.total:
            self.fullest = Moment(**vars(self.now))

    def is_gradient(self, parameter: Tensor) -> None:
        """Count the storage of a parameter's gradient as `gradients` from now on."""
        assert parameter.grad is not None  # noqa: S101 - for the type checker; called once it is there
        key = parameter.grad.untyped_storage()._cdata
        if key in self.kinds:
            kind, size = self.kinds[key]
            self._add(kind, -size)
            self._add("gradients", size)
            self.kinds[key] = "gradients", size

    def _gone(self, key: int) -> None:
        kind, size = self.kinds.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        setattr(self.now, kind, getattr(self.now, kind) + size)


class _NoScores(TorchFunctionMode):
    """Replace softmax attention by `_Attention`, because fused kernels have no T x T matrix and the meta device has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """The tensors that a fused attention kernel allocates and saves for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, outputs, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def fullest_moment(
    student: Any,
    teacher: PreTrainedModel | None,
    stage: Stage,
    *,
    rows: int,
    tokens: int,
    accumulates: bool,
    checkpointing: bool,
    position_ids: Tensor | None = None,
) -> Moment:
    """The moment of a step with the most bytes.

    Args:
        student, teacher: models on the meta device; `choose_trained` has selected the student's trained parameters.
        rows, tokens: the size of a forward pass.
        accumulates: True if gradients of an earlier forward pass exist.
        position_ids: `[rows, tokens]` of packed documents, on the CPU; None where each row is one.

    Raises:
        RuntimeError, NotImplementedError, ValueError: an operation depends on the data, such as the choice of experts.
    """
    base: LinearizedForCausalLM = student.get_base_model() if hasattr(student, "get_base_model") else student
    models: list[nn.Module] = [student, *([teacher] if teacher is not None else [])]
    held = [x for model in models for x in (*model.parameters(), *model.buffers())]
    counter = _Counter(int(base.config.vocab_size), {x.untyped_storage()._cdata for x in held})
    trained = [p for p in student.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(counter.is_gradient) for p in trained]
    try:
        with _checkpointed(base, checkpointing), _packed(base, position_ids), counter, _NoScores():
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
                    counter.is_gradient(parameter)
            ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
            _loss(base, student, teacher, stage, ids, checkpointing).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return counter.fullest


def _loss(
    base: LinearizedForCausalLM,
    student: Any,
    teacher: PreTrainedModel | None,
    stage: Stage,
    ids: Tensor,
    checkpointing: bool,
) -> Tensor:
    """The loss of `StageLoop.micro_loss`, for rows in which every token counts."""
    if "align" in stage.weights and teacher is not None:
        aligned = Alignment(base, teacher, stage.length, checkpointing=checkpointing)
        return aligned.losses_of(ids, None, torch.empty(0, device=ids.device), _mask_of(ids), beyond=False).mean()
    at = torch.zeros(ids.shape[0] * (ids.shape[1] - 1), dtype=torch.long, device=ids.device)
    logits = logits_at(base, at, at, through=student, input_ids=ids, use_cache=False)
    said: Any = None
    if "distill" in stage.weights:
        if stage.top_k is not None:
            shape = (len(at), min(stage.top_k, logits.shape[-1]))
            said = _kept(*shape) if teacher is None else None
        if teacher is not None:
            with torch.no_grad():
                said = logits_at(teacher, at, at, input_ids=ids, **_mask_of(ids), use_cache=False)
                if stage.top_k is not None:
                    said = top_k_of(said, stage.top_k, stage.temperature)
    return token_losses(logits, at, said, stage.weights, stage.temperature)


def _mask_of(ids: Tensor) -> dict[str, Any]:
    """A mask `[B, 1, T, T]` of no bytes; without a mask transformers reads the positions, which have no data."""
    rows, tokens = ids.shape
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta").expand(rows, 1, tokens, tokens)}


def _kept(positions: int, k: int) -> TopK:
    """The stored log-probabilities of a teacher that is not loaded."""
    tokens, log = (torch.zeros(positions, size, device="meta") for size in (k, k + 1))
    return TopK(tokens.long(), log)


@contextmanager
def _packed(model: LinearizedForCausalLM, position_ids: Tensor | None) -> Iterator[None]:
    """Pass the layout of packed documents to each layer, because meta tensors have no data to compute it from."""
    segments = None
    if position_ids is not None:
        segments = segments_of(None, position_ids, len(position_ids), position_ids.shape[1], continued=False)
    if segments is None:
        yield
        return
    mask: Any = layer_mask(segments, segments.device)
    layout = layout_of(mask)
    for name, value in list(vars(layout).items()):
        if isinstance(value, Tensor):
            setattr(layout, name, value.to("meta"))
    mask = mask.to("meta")
    mask._layout = layout

    def give(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**keywords, "attention_mask": mask}

    hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in model.attention_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
