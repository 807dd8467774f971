"""The settings of decoding that a user chooses. No torch, so a wrong value fails at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, check_numbers

if TYPE_CHECKING:
    from linearize.generation.sampling import Sampling

_GREEDY_BELOW = 1e-5  # the logits of a lower temperature overflow, and its samples are the most likely tokens
_MOST_STOPS = 16


@dataclass(frozen=True)
class Decoding:
    """The settings of a text: its length, its end, and the choice of each token.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        temperature: 0 for greedy decoding; otherwise tokens are sampled.
        top_k: sample among this many most likely tokens; 0 for all.
        top_p: sample among the most likely tokens, up to this probability mass.
        min_p: sample among tokens with at least this share of the most likely one's probability.
        repetition_penalty: above 1, tokens of the new prompt and text become less likely; None for the model's own.
        presence_penalty: subtracted from the logit of each token that was written.
        frequency_penalty: subtracted from the logit of a token once for each time that it was written.
        stop: strings that end the text, and are not part of it.
        seed: the seed of the sampling.

    Raises:
        DataError: a value is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(0, max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k)
        check_numbers(0, 1, top_p=self.top_p, min_p=self.min_p)
        check_numbers(0.01, 100, repetition_penalty=self.repetition_penalty)
        check_numbers(-2, 2, presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty)
        check_numbers(-(2**63), 2**64 - 1, seed=self.seed)
        if "" in self.stop or len(self.stop) > _MOST_STOPS:
            raise DataError(f"stop {list(self.stop)}: expected up to {_MOST_STOPS} strings, none of them empty")

    def sampling(self, model: Any, tokenizer: Any) -> Sampling:
        """These settings with the end tokens of `model`, and its own repetition penalty if none is set."""
        from transformers import GenerationConfig

        from linearize.generation.sampling import Sampling

        settings = model.generation_config
        own = GenerationConfig(
            eos_token_id=settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            repetition_penalty=self.repetition_penalty or settings.repetition_penalty or 1.0,
        )
        options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}  # transformers refuses 0
        if self.temperature >= _GREEDY_BELOW:
            options |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            options |= {"min_p": self.min_p or None}
        found = Sampling.of(own, options)
        assert found is not None  # noqa: S101 - it follows all of these settings
        return replace(
            found,
            max_new_tokens=self.max_new_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
