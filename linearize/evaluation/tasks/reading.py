"""Read texts with a model, in pieces on a cache so that logits take little memory, and continue them token by token.

Dimensions: B texts, T tokens a text, C tokens a piece, N new tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from linearize.errors import ModelError
from linearize.evaluation.baselines import branches_off
from linearize.evaluation.tasks.hidden import pieces as hidden_pieces
from linearize.sources.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


def pieces(model: Any, ids: Tensor, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Reads texts from their start, piece by piece, as one forward pass would.

    Args:
        model: in eval mode, called without gradients.
        ids: `[B, T]` on the CPU, without pads.
        first: the first position whose logits are wanted.

    Yields:
        (start, `[B, C, V]` float32): the logits at positions start, start + 1, ..., each for the token after it.
    """
    for start, hidden in hidden_pieces(model, ids, first=first):
        for at, logits in hidden.slices():
            yield start + at, logits


def losses(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Cross entropy of texts `[B, T + 1]` in nats, piece by piece `[B, C]` float64 on the CPU, T in all: entry p - 1
    is that of the token after p tokens. The last token is not read."""
    for start, logits in pieces(model, ids[:, :-1]):
        targets = ids[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
        yield F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().cpu()


def agreements(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Agreement of each token from place `prompt` on with the model's most likely one: `[B, T - prompt]` float64 on the
    CPU, 1 or 0, and NaN where the logits are."""
    found = []
    for start, logits in pieces(model, ids[:, :-1], prompt - 1):
        best, likely = logits.max(-1)
        same = likely.cpu() == ids[:, start + 1 : start + 1 + logits.shape[1]]
        found.append(same.double().masked_fill(~best.isfinite().cpu(), torch.nan))
    return torch.cat(found, 1)


def divergences(teacher: Any, model: Any, ids: Tensor, prompt: int) -> Tensor:
    """KL(teacher || model) in nats for each token from place `prompt` on: `[B, T - prompt]` float64 on the CPU.

    Raises:
        ModelError: two vocabularies of different size.
    """
    found = []
    both = zip(pieces(teacher, ids[:, :-1], prompt - 1), pieces(model, ids[:, :-1], prompt - 1), strict=True)
    for (_, theirs), (_, ours) in both:
        if theirs.shape != ours.shape:
            raise ModelError(
                f"the model's vocabulary has {ours.shape[-1]} entries and the teacher's {theirs.shape[-1]}: "
                "only models with one tokenizer can be compared"
            )
        log_p, log_q = F.log_softmax(theirs, -1).to(ours.device), F.log_softmax(ours, -1)
        found.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).double().cpu())
    return torch.cat(found, 1)


def write(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, pick: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Continues prompts by exactly `new_tokens` each: no token ends a text; tokens after an end token are kept too.

    Args:
        model: in eval mode, called without gradients. Its generation settings (penalties, top-p) are not used.
        prompts: B lists of token ids, each with at least one; shorter ones are padded on the left.
        pick: from logits `[B, V]` float32 and the step, the next tokens `[B]`.

    Returns:
        `[B, N]` on the CPU; -1 from where on a row's logits are not numbers.
    """
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (real.cumsum(1) - 1).clamp_min(0)
    padded = bool((real == 0).any())
    cache, new = DynamicCache(config=model.config.get_text_config()), []
    sound = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(new_tokens):
        # Without pads the cache determines positions and masks, so attention can use its fastest kernel.
        placed = {"attention_mask": real, "position_ids": positions} if padded else {}
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **placed)
        logits = output.logits[:, -1].float()
        # Minus infinity is a masked token.
        sound = sound & ~(logits.isnan() | (logits == torch.inf)).any(-1)
        ids = pick(logits.nan_to_num(0.0), step)[:, None]
        new.append(ids[:, 0].masked_fill(~sound, -1))
        real, positions = F.pad(real, (0, 1), value=1), positions[:, -1:] + 1
    return torch.stack(new, 1).cpu()


def greedy(logits: Tensor, step: int) -> Tensor:
    """A `pick` for `write`: the most likely token."""
    return logits.argmax(-1)


def sampled(seed: int, items: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
    """A `pick` for `write` that samples at temperature 1, by the Gumbel-max trick.

    The noise is drawn on the CPU from `seed` and the item's own number. So a text depends on no batch, nor on how
    often or where it is written; and two models use the same noise, so that they differ where their
    distributions do, not by the luck of the draw.
    """
    seeds = [hashlib.sha256(f"{seed} {item}".encode()).digest()[:7] for item in items]
    generators = [torch.Generator().manual_seed(int.from_bytes(each, "big")) for each in seeds]

    def pick(logits: Tensor, step: int) -> Tensor:
        drawn = [torch.empty(logits.shape[-1]).exponential_(generator=generator) for generator in generators]
        return (logits - torch.stack(drawn).log().to(logits.device)).argmax(-1)

    return pick


class Kept:
    """Results for items of the last model, which tasks share. Its key is the fingerprint and the branches that are off:
    a model that was trained in between is another one, and so is one without its recurrence."""

    def __init__(self) -> None:
        self._whose: object = None
        self._made: dict[int, Tensor] = {}

    def get(
        self, model: Any, items: Sequence[int], batch_size: int, make: Callable[[Sequence[int]], Iterable[Tensor]]
    ) -> list[Tensor]:
        """Per item what `make` gives for it, called on `batch_size` items at a time, and only on those not yet made."""
        whose = fingerprint(model), branches_off(model)
        if whose != self._whose:
            self._whose, self._made = whose, {}
        missing = [item for item in dict.fromkeys(items) if item not in self._made]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            self._made.update(zip(batch, make(batch), strict=True))
        return [self._made[item] for item in items]
