"""lm-eval's Hugging Face model, with shared beginnings read once and few logits at a time; `linearize` in lm-eval.

lm-eval looks for no plugins, so its own command sees the name where this module runs it::

    python -m linearize.evaluation.tasks.lm --model linearize --model_args pretrained=FOLDER --tasks gsm8k
"""

from __future__ import annotations

from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F

import linearize  # noqa: F401 - registers converted checkpoints with the auto classes
from linearize.evaluation.tasks.hidden import PROMPTS, rows_at_once
from linearize.evaluation.tasks.prefix import Query, common_length, log_likelihoods
from linearize.generation.prompt import prefill_chunk


@register_model("linearize")
class LinearizeLM(HFLM):
    """`HFLM` with log-likelihoods of `prefix.log_likelihoods`.

    Args:
        pretrained: a model in memory, a folder or a Hub id.
        plain: score every continuation by itself, as `HFLM` does.
        options: of `HFLM`.
    """

    def __init__(self, pretrained: Any, *, plain: bool | str = False, **options: Any) -> None:
        # Sums of log-probabilities in bfloat16 would lose more than the models differ by.
        super().__init__(pretrained=pretrained, **{"backend": "causal", "softmax_dtype": "float32", **options})
        self._plain = plain in (True, "True", "true")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if pair[1]:
            return pair
        # The text as a whole takes no more tokens than its context: one of them spans both. lm-eval stops here; the
        # continuation is then what follows the tokens that the two have in common.
        whole = self.tok_encode(context + continuation)
        common = common_length([tuple(pair[0]), tuple(whole)])
        return whole[:common] or [self.prefix_token_id], whole[common:]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:  # lm-eval asserts the same, without words
            raise AssertionError(
                f"an answer has {longest:,} tokens, and the model's context {self.max_length:,}; leave the task out"
            )
        # With `batch_size=auto` lm-eval looks for the largest batch that fits its own way of scoring.
        if self._plain or not isinstance(self.batch_size, int):
            plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
            return plain
        queries = [
            Query(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), tuple(continuation))
            for _, context, continuation in requests
        ]
        answers = log_likelihoods(
            self.model,
            queries,
            batch_size=self.batch_size,
            max_length=self.max_length,
            # `override_bs` marks the windows of a document, which share nothing.
            share=override_bs is None,
        )
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        # Long prompts are read in pieces, and few of them together: eight pages at once take gigabytes.
        rows, width = context.shape
        size = rows_at_once(width, rows, PROMPTS)
        chunk = prefill_chunk(context.device, size)
        if width > chunk:
            settings["prefill_chunk_size"] = chunk
        if size == rows:
            return cast("Tensor", super()._model_generate(context, max_length, stop, **settings))
        parts = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            own = {name: value[part] if isinstance(value, Tensor) else value for name, value in settings.items()}
            parts.append(super()._model_generate(context[part], max_length, stop, **own))
        longest = max(part.shape[1] for part in parts)
        pad = self.tokenizer.pad_token_id
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
