"""Quality on held-out rows of tokens: loss, divergence from the teacher, and agreement with it.

Dimensions: N rows, L tokens a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import DataError, ModelError, is_out_of_memory
from linearize.evaluation.tasks.task import draw, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A label that is not counted, as in torch's cross entropy.
IGNORE = -100
# Positions whose float32 log-probabilities exist at one time: 256 of a vocabulary of 128k take 0.13 GB each.
CHUNK_POSITIONS = 256
_COLUMNS = ("input_ids", "labels", "position_ids")


class Rows(Protocol):
    """Rows of tokens, all [N, L] int64: labels of -100 are not counted, position_ids may be None (nothing packed)."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor | None: ...


class Estimate(NamedTuple):
    """A mean over rows and its standard error (None with fewer than two rows)."""

    mean: float
    stderr: float | None


class PairedDifference(NamedTuple):
    """Mean over rows of a - b; `kl` is None unless both have it."""

    loss: Estimate
    kl: Estimate | None


@dataclass(frozen=True)
class RowScores:
    """One model's scores on N rows; every entry is a mean over the row's counted positions.

    Attributes:
        loss: [N] float64, cross entropy in nats per token.
        kl: [N] float64, KL(teacher || model) in nats per token; None without a teacher.
        agreement: [N] float64, share of positions where model and teacher have the same most likely token, or None.
        tokens: [N] int64, how many positions were counted.
    """

    loss: Tensor
    kl: Tensor | None
    agreement: Tensor | None
    tokens: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token (rows weigh by their tokens)."""
        return math.exp(float((self.loss * self.tokens).sum() / self.tokens.sum()))

    @property
    def mean_loss(self) -> Estimate:
        """Mean and standard error of the rows' losses, nats per token."""
        return _estimate(self.loss)

    @property
    def mean_kl(self) -> Estimate | None:
        """Mean and standard error of the rows' divergences, nats per token."""
        return None if self.kl is None else _estimate(self.kl)

    @property
    def mean_agreement(self) -> Estimate | None:
        """Mean and standard error of the rows' agreement, a share in [0, 1]."""
        return None if self.agreement is None else _estimate(self.agreement)


def score_rows(
    model: PreTrainedModel,
    rows: Mapping[str, Tensor] | Rows,
    *,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 4,
) -> RowScores:
    """Scores a model on rows of tokens, beside its teacher where one is given.

    Logits at t predict labels[t + 1]. In packed rows (position ids that restart) a document's first token is never
    counted: only another document stands before it.

    Args:
        model: a causal LM on its device; it is in eval mode for the run and put back afterwards.
        rows: `input_ids` and `labels` [N, L] int64, and optionally `position_ids` [N, L], as a mapping or attributes.
        teacher: another causal LM of the same vocabulary, on any device.
        batch_size: rows per forward pass; halved where memory does not hold them.

    Raises:
        DataError: no rows, or a row in which nothing is counted.
        ModelError: logits that are not finite, or two vocabularies of different size.
    """
    input_ids, labels, position_ids = (_column(rows, name) for name in _COLUMNS)
    if input_ids is None or labels is None or len(input_ids) == 0:
        raise DataError("no rows of tokens to score: give input_ids and labels")
    counted = labels[:, 1:] != IGNORE
    if position_ids is not None:
        counted = counted & (position_ids[:, 1:] != 0)
    tokens = counted.sum(1)
    if not bool(tokens.all()):
        raise DataError(f"row {int((tokens == 0).nonzero()[0])} has no position to score: leave such rows out")

    parts = []
    with evaluating(model), evaluating(teacher), torch.inference_mode():
        start = 0
        while start < len(input_ids):
            batch = slice(start, start + batch_size)
            positions = None if position_ids is None else position_ids[batch]
            try:
                parts.append(_score_batch(model, teacher, input_ids[batch], labels[batch], positions, counted[batch]))
            except Exception as error:
                if batch_size == 1 or not is_out_of_memory(error):
                    raise
                batch_size //= 2
            else:
                start = batch.stop
    # Joined outside inference mode, so that callers may use the scores in any computation.
    loss, kl, agreement = torch.cat(parts, dim=1) / tokens.cpu()
    return RowScores(loss, None if teacher is None else kl, None if teacher is None else agreement, tokens.cpu())


def paired_difference(a: RowScores, b: RowScores) -> PairedDifference:
    """Mean difference a - b over the rows that both were scored on, which cancels what makes a row hard for any model.

    Raises:
        DataError: the two were not scored on the same rows.
    """
    if not torch.equal(a.tokens, b.tokens):
        raise DataError("the two systems were scored on different rows: score both on the same ones")
    kl = None if a.kl is None or b.kl is None else _estimate(a.kl - b.kl)
    return PairedDifference(_estimate(a.loss - b.loss), kl)


def _score_batch(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None,
    counted: Tensor,
) -> Tensor:
    """Sums over each row's counted positions: [3, B] float64 of loss, KL and agreement (zeros without a teacher)."""
    logits = _logits(model, input_ids, position_ids)
    if teacher is None or teacher is model:
        teacher_logits = None if teacher is None else logits
    else:
        teacher_logits = _logits(teacher, input_ids, position_ids)
    if teacher_logits is not None and teacher_logits.shape[-1] != logits.shape[-1]:
        raise ModelError(
            f"the model's vocabulary has {logits.shape[-1]} entries and the teacher's {teacher_logits.shape[-1]}: "
            "only models with one tokenizer can be compared"
        )
    row, step = counted.nonzero(as_tuple=True)
    targets = labels[row, step + 1]
    sums = torch.zeros(3, len(input_ids), dtype=torch.float64)
    for start in range(0, len(row), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        log_q = _log_probabilities(logits, row[chunk], step[chunk], "model")
        per_position = [F.nll_loss(log_q, targets[chunk].to(log_q.device), reduction="none")]
        if teacher_logits is not None:
            log_p = _log_probabilities(teacher_logits, row[chunk], step[chunk], "teacher").to(log_q.device)
            per_position.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
            per_position.append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        for total, values in zip(sums, per_position, strict=False):
            total.index_add_(0, row[chunk].cpu(), values.double().cpu())
    return sums


def _log_probabilities(logits: Tensor, row: Tensor, step: Tensor, whose: str) -> Tensor:
    """Float32 log-probabilities [positions, V] at some positions of logits [B, L, V]."""
    chosen = logits[row.to(logits.device), step.to(logits.device)].float()
    if not bool(torch.isfinite(chosen).all()):
        raise ModelError(f"the {whose} gives logits that are not finite on the held-out rows: nothing to score")
    return F.log_softmax(chosen, dim=-1)


def _logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """Logits [B, L, V] in the model's own type. Packing is told by the position ids, and by a mask to those that do not
    listen to them."""
    device = next(model.parameters()).device
    positions = None if position_ids is None else position_ids.to(device)
    apart = {}
    if positions is not None and model.config.model_type != "linearized":
        from linearize.sources.documents import documents_apart  # which loads transformers

        apart = documents_apart(model, positions)
    logits: Tensor = model(input_ids=input_ids.to(device), position_ids=positions, use_cache=False, **apart).logits
    return logits


def drawn_rows(rows: Mapping[str, Tensor] | Rows, limit: float | None, seed: int) -> dict[str, Tensor]:
    """`limit` of the rows (below 1 a share of them) at random, in their order; all of them without one."""
    columns = {name: column for name in _COLUMNS if (column := _column(rows, name)) is not None}
    places = draw("held_out", len(columns["input_ids"]), limit, seed)
    return {name: column[places] for name, column in columns.items()}


def _column(rows: Mapping[str, Tensor] | Rows, name: str) -> Tensor | None:
    column: Tensor | None = rows.get(name) if isinstance(rows, Mapping) else getattr(rows, name, None)
    return column


def _estimate(values: Tensor) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None)
