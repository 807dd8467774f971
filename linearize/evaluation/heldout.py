"""Quality on held-out rows of tokens: loss, divergence from the teacher, and agreement with it.

Dimensions: N rows, L tokens a row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import DataError, ModelError, is_out_of_memory
from linearize.evaluation.tasks.hidden import Hidden, hidden_states, positions_at_once, read, rows_at_once
from linearize.evaluation.tasks.names import HELD_OUT
from linearize.evaluation.tasks.task import Item, Measure, Task, evaluating, mean_and_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.evaluation.tasks.task import TaskScore

# A label that is not counted, as in torch's cross entropy.
IGNORE = -100
_COLUMNS = ("input_ids", "labels", "position_ids")
_SCORES = ("loss", "kl", "agreement", "tokens")  # of `RowScores`
_VERSION = 1


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
        drawn: which rows of `total` these are, drawn with `seed`; None if they are all.
    """

    loss: Tensor
    kl: Tensor | None
    agreement: Tensor | None
    tokens: Tensor
    drawn: list[int] | None = None
    total: int | None = None
    seed: int | None = None

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

    Logits at t predict labels[t + 1]. In packed rows (position ids that restart) the first token of a document is not
    counted, because only another document precedes it.

    Args:
        model: a causal LM on its device; it is in eval mode for the run and put back afterwards.
        rows: `input_ids` and `labels` [N, L] int64, and optionally `position_ids` [N, L], as a mapping or attributes.
        teacher: another causal LM of the same vocabulary, on any device.
        batch_size: rows per forward pass, fewer where they are long; halved where memory does not hold them.

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
    batch_size = rows_at_once(input_ids.shape[1], batch_size)
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
    ours = _hidden(model, input_ids, position_ids)
    beside = ours if teacher is model else None if teacher is None else _hidden(teacher, input_ids, position_ids)
    row, step = counted.nonzero(as_tuple=True)
    targets = labels[row, step + 1]
    sums = torch.zeros(3, len(input_ids), dtype=torch.float64)
    size = positions_at_once(model)
    for start in range(0, len(row), size):
        chunk = slice(start, start + size)
        log_q = _log_probabilities(ours, row[chunk], step[chunk], "model")
        per_position = [F.nll_loss(log_q, targets[chunk].to(log_q.device), reduction="none")]
        if beside is not None:
            log_p = log_q if beside is ours else _log_probabilities(beside, row[chunk], step[chunk], "teacher")
            if log_p.shape != log_q.shape:
                raise ModelError(
                    f"the model's vocabulary has {log_q.shape[-1]} entries and the teacher's {log_p.shape[-1]}: "
                    "only models with one tokenizer can be compared"
                )
            log_p = log_p.to(log_q.device)
            per_position.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
            per_position.append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        for total, values in zip(sums, per_position, strict=False):
            total.index_add_(0, row[chunk].cpu(), values.double().cpu())
    return sums


def _log_probabilities(hidden: Hidden, row: Tensor, step: Tensor, whose: str) -> Tensor:
    """Float32 log-probabilities [positions, V]."""
    logits = hidden.logits(row, step).float()
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"the {whose} gives logits that are not finite on the held-out rows: nothing to score")
    return F.log_softmax(logits, dim=-1)


def _hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None) -> Hidden:
    """The hidden states [B, L, D]. Packed rows are one forward pass: no cache can continue them."""
    if position_ids is None:
        return read(model, input_ids)
    positions, apart = position_ids.to(model.device), {}
    if model.config.model_type != "linearized":
        from linearize.sources.documents import documents_apart  # which loads transformers

        apart = documents_apart(model, positions)
    ids = input_ids.to(model.device)
    return hidden_states(model, input_ids=ids, position_ids=positions, use_cache=False, **apart)


class HeldOut(Task):
    """Held-out rows as a task, so that their results are kept and shared out like those of any other.

    Args:
        rows: as `score_rows` takes them.
        teacher: as `score_rows` takes it.

    Raises:
        DataError: no rows.
    """

    name = suite = HELD_OUT
    metric = "loss"
    higher_is_better = False
    item_bytes = 160

    def __init__(self, rows: Mapping[str, Tensor] | Rows, teacher: PreTrainedModel | None) -> None:
        from linearize.sources.fingerprint import fingerprint  # lazy, because it imports transformers

        self.rows = {name: column for name in _COLUMNS if (column := _column(rows, name)) is not None}
        self.teacher = teacher
        if not len(self.rows.get("input_ids", ())):
            raise DataError("no rows of tokens to score: give input_ids and labels")
        content = {name: column.tolist() for name, column in self.rows.items()}
        beside = None if teacher is None else fingerprint(teacher)
        self.digest = hashlib.sha256(json.dumps([_VERSION, content, beside]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], batch_size: int
    ) -> list[Item]:
        """As `Task.score`; the value is the loss."""
        chosen = {name: column[list(indices)] for name, column in self.rows.items()}
        found = score_rows(model, chosen, teacher=self.teacher, batch_size=batch_size)
        columns = {name: column.tolist() for name in _SCORES if (column := getattr(found, name)) is not None}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [Item(row["loss"], metrics=row) for row in rows]

    def measures(self, indices: Sequence[int], items: Sequence[Item]) -> list[Measure]:
        """Loss, divergence and agreement; each row has the tag `tokens`."""
        tags = [{"tokens": item.metrics["tokens"]} for item in items]
        found = []
        for metric in _SCORES[:-1] if self.teacher is not None else ["loss"]:
            values = [item.metrics[metric] for item in items]
            value, stderr = mean_and_error(values)
            found.append(Measure(metric, metric == "agreement", value, stderr, values, tags, len(values)))
        return found


def row_scores(measured: Sequence[TaskScore]) -> RowScores:
    """The scores of one model that `HeldOut` measured."""
    columns = {one.metric: torch.tensor(one.items, dtype=torch.float64) for one in measured}
    first = measured[0]
    tokens = torch.tensor([tag["tokens"] for tag in first.tags])
    drawn = None if first.seed is None else [tag["item"] for tag in first.tags]
    kl, agreement = columns.get("kl"), columns.get("agreement")
    return RowScores(columns["loss"], kl, agreement, tokens, drawn, first.total, first.seed)


def _column(rows: Mapping[str, Tensor] | Rows, name: str) -> Tensor | None:
    column: Tensor | None = rows.get(name) if isinstance(rows, Mapping) else getattr(rows, name, None)
    return column


def _estimate(values: Tensor) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None)
