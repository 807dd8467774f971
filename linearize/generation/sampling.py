"""Choose the next token from logits, for the settings of transformers' `generate` that need no sync with the device.
Every step then launches the same kernels.

The chosen tokens equal those of transformers, sampled ones included: the same operations in the same order, with the
same random numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# Settings that only sampling uses; and settings that are handled elsewhere or do not affect the choice of a token.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_SILENT = (
    "transformers_version", "max_length", "max_new_tokens", "do_sample", "bos_token_id",
    "eos_token_id", "pad_token_id", "decoder_start_token_id", "repetition_penalty", "return_dict_in_generate",
    "prefill_chunk_size", "compile_config", "disable_compile", "length_penalty", "early_stopping",
)  # fmt: skip
_FOLLOWED = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token, and conditions that end a text.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        eos: tokens that end a row.
        pad: fills a row after its end.
        temperature: None for greedy decoding; otherwise tokens are sampled.
        top_k, top_p, min_p: filters for unlikely tokens before sampling; None for no filter.
        repetition_penalty: divides positive logits, and multiplies negative logits, of tokens that already occurred.
        presence_penalty: subtracted from the logits of tokens that were written.
        frequency_penalty: subtracted from the logit of a token for each time that it was written.
    """

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    pad: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def of(cls, settings: GenerationConfig, options: Mapping[str, Any]) -> Sampling | None:
        """Translate transformers' `settings` and further options of `generate`; None if they need an unsupported
        feature, such as beams, a limit on the text's total length, or processors that read the text."""
        merged = copy.deepcopy(settings)
        if merged.update(**options) or merged.max_new_tokens is None:
            return None
        neutral = GenerationConfig._get_default_generation_params()
        sampled = bool(merged.do_sample)
        if unfollowed(merged):
            return None
        eos = merged.eos_token_id
        ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        pad = merged.pad_token_id
        chosen: dict[str, Any] = {}
        if sampled:
            wanted = {name: getattr(merged, name) for name in _FOLLOWED}
            wanted = {name: neutral.get(name) if value is None else value for name, value in wanted.items()}
            chosen = {"temperature": wanted["temperature"], "top_k": wanted["top_k"] or None}
            chosen |= {"top_p": None if wanted["top_p"] == 1 else wanted["top_p"], "min_p": wanted["min_p"]}
        penalty = merged.repetition_penalty
        return cls(
            max_new_tokens=merged.max_new_tokens,
            eos=ends,
            pad=pad if pad is not None else ends[0] if ends else 0,
            repetition_penalty=1.0 if penalty is None else penalty,
            **chosen,
        )

    @property
    def rule(self) -> Sampling:
        """The settings of a single step, equal for all text lengths."""
        return replace(self, max_new_tokens=0)

    def warpers(self) -> LogitsProcessorList:
        """transformers' logits warpers, in its order."""
        found = LogitsProcessorList()
        if self.temperature not in (None, 1.0):
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found

    @property
    def counts_written(self) -> bool:
        """True if the choice depends on how often each token was written."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def penalised(self, logits: Tensor, written: Tensor) -> Tensor:
        """Logits after the penalties on how often each token was written; both are `[B, vocabulary]`."""
        return logits - self.frequency_penalty * written - self.presence_penalty * (written > 0)

    def choose(
        self,
        logits: Tensor,
        there: Tensor | None,
        ids: Tensor,
        written: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The next token of each row, `[B]`.

        Args:
            logits: `[B, vocabulary]`, float32.
            there: `[B, vocabulary]` bool, True for tokens that already occurred; None without a repetition penalty.
            ids: `[B, 1]` the last tokens; required by the warpers' interface, but unused.
            written: `[B, vocabulary]` how often each token was written; None unless `counts_written`.
            generator: of the random numbers; None for the device's own.
        """
        if there is not None:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(there, penalised, logits)
        if written is not None:
            logits = self.penalised(logits, written)
        if self.temperature is None:
            return logits.argmax(-1)
        shares: Tensor = self.warpers()(ids, logits).softmax(-1)
        # The same samples as `torch.multinomial`, which syncs the device to check its input.
        return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1)


def unfollowed(settings: GenerationConfig) -> list[str]:
    """The names of settings that ask for an unsupported feature."""
    neutral = GenerationConfig._get_default_generation_params()
    known = _FOLLOWED if settings.do_sample else _OF_SAMPLING
    return [
        name
        for name, value in vars(settings).items()
        if not (name.startswith("_") or name in _SILENT or (name in _OF_SAMPLING and name in known))
        and value is not None
        and value != neutral.get(name, False)
    ]
