"""Prompts through a model, in padded batches: the tokens that it writes, or what it expects at the prompts' ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from linearize.evaluation.tasks.hidden import read
from linearize.generation.prompt import prefill_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    pad: int,
    done: Callable[[int, list[int]], bool] = lambda row, new: False,
) -> tuple[list[list[int]], Tensor]:
    """Greedy continuations.

    Args:
        model: in eval mode. It reads long prompts in pieces, so that what it holds beside its cache stays small.
        prompts: B lists of token ids, each with at least one.
        pad: a token to fill rows with; which one changes nothing.
        done: True if a row, by its index, needs no more tokens than the new ones it is given.

    Returns:
        per prompt its new tokens, up to `new_tokens`; and `[B]` bool, True if all logits of a row were numbers.
    """
    ids, mask = _padded(prompts, pad, model.device)
    watch, chunk = _Watch(len(prompts), model.device), prefill_chunk(model.device, len(prompts))
    # Overrides the checkpoint's sampling and penalties, so that systems are compared under one greedy decoding.
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        prefill_chunk_size=chunk if ids.shape[1] > chunk else None,
    )
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=StoppingCriteriaList([_Done(ids.shape[1], done)]),
        )
    return output[:, ids.shape[1] :].tolist(), watch.sound.cpu()


def expected(model: Any, prompts: Sequence[Sequence[int]], last: int, pad: int) -> tuple[Tensor, Tensor]:
    """The most likely next token at the `last` positions of each prompt, as one forward pass gives them.

    Args:
        model, prompts, pad: as for `written`.
        last: positions, counted from the ends; a prompt that is shorter has filling in front.

    Returns:
        `[B, last]` tokens, the one at `[:, -1]` being what would follow the prompt; `[B]` bool as for `written`.
    """
    ids, mask = _padded(prompts, pad, model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        hidden = read(model, ids, mask=mask, positions=positions, first=max(ids.shape[1] - last, 0))
        found = [(logits.argmax(-1), _sound(logits)) for _, logits in hidden.slices()]
    likely, sound = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    real = mask[:, -likely.shape[1] :].bool()
    return likely.cpu(), (sound | ~real).all(1).cpu()


class _Watch(LogitsProcessor):
    """Records which rows had logits that are not numbers; the scores stay as they are."""

    def __init__(self, rows: int, device: Any) -> None:
        self.sound = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.sound &= _sound(scores)
        return scores


class _Done(StoppingCriteria):
    """Ends the rows that are done; the batch ends with the last of them."""

    def __init__(self, start: int, done: Callable[[int, list[int]], bool]) -> None:
        self.start, self.done = start, done

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        ended = [self.done(row, new) for row, new in enumerate(input_ids[:, self.start :].tolist())]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


def _sound(logits: Tensor) -> Tensor:
    """True where logits are numbers; minus infinity, a masked token, counts as one."""
    return ~(logits.isnan() | (logits == torch.inf)).any(-1)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]`, pads on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
