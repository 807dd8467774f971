"""Training text written by the teacher itself, so no data set has to be found, licensed or downloaded.

A plain language model writes from its start token. A chat model spends half of the tokens on conversations with the
Magpie method (arXiv 2406.08464): given its template up to the start of a user turn, it writes the user's question, then
the answer. Sampling is pure (no top-k, no top-p), because the text has to follow the distribution that the student
learns.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from linearize.errors import ModelError, OutputError
from linearize.runtime import cache
from linearize.runtime.claims import claimed
from linearize.runtime.files import staged_file
from linearize.runtime.folders import cache_folder
from linearize.runtime.processes import seconds_between_lines
from linearize.sources.fingerprint import fingerprint, tokenizer_fingerprint
from linearize.sources.limits import context_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 2
"""Part of the cache key: increase it when the same arguments give another text."""

SHORTEST_QUESTION = 16
"""A chat template is not used if it leaves fewer tokens than this for the question."""
LONGEST_QUESTION = 128
"""A longer question is dropped, because a few long ones would delay the whole batch."""

_EMPTY_BATCHES = 3
_PLACEHOLDER = "placeholder"


class ChatPieces(NamedTuple):
    """Token ids of a chat template before the user's text, and after it up to the start of the answer."""

    before: list[int]
    after: list[int]


def self_written_documents(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    sample_length: int = 512,
    batch_size: int = 64,
    progress: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Documents written by `teacher`: token ids, `tokens` in total, at most `sample_length` per document.

    Each document starts with the given tokens (the start token, or the chat template's opening) and ends with the end
    token, unless it reaches the maximum length. The same arguments give the same documents; they are cached in
    `cache_folder()/self-text` under a key of all arguments and the weights. `batch_size` is the number of documents
    written at once: more is faster (SmolLM2-135M on one CPU core, after 60 tokens: 100 tokens/s at 16, 193 at 64, 209
    at 128) and takes more memory.

    Raises:
        ModelError: the teacher has no start token, or ends every text immediately.
    """
    sample_length = min(sample_length, context_of(teacher.config) or sample_length)
    sampling = [tokens, seed, temperature, sample_length, batch_size]
    ends = teacher.generation_config.eos_token_id
    key = json.dumps([FORMAT_VERSION, *sampling, ends, fingerprint(teacher), tokenizer_fingerprint(tokenizer)])
    path = cache_folder() / "self-text" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    cache.limit()  # raises for a malformed limit before any work
    kept = _read(path)
    if kept is not None:
        cache.used(path)
        progress(f"self text: {tokens:,} tokens, written before")
        return kept
    writer = _Writer(teacher, tokenizer, sample_length, batch_size, temperature, _Pace(tokens, progress))
    with _sampling(teacher, seed):
        chat = chat_pieces(tokenizer)
        conversations = writer.conversations(chat, tokens // 2) if chat else []
        documents = conversations + writer.texts(tokens - sum(map(len, conversations)))
    random.Random(seed).shuffle(documents)  # noqa: S311 - a shuffle, not a secret
    try:
        _write(path, documents)
        cache.make_room(path, progress)
    except OutputError as problem:
        progress(f"self text: not kept for the next run; {problem}")
    return documents


class _Pace(StoppingCriteria):
    """Counts sampled tokens, reports the speed, and stops a batch once a quarter of its rows have ended."""

    def __init__(self, wanted: int, progress: Callable[[str], None]) -> None:
        self.wanted, self.progress = wanted, progress
        self.kept = self.told = 0
        self.most = wanted
        self.started = self.reported = time.monotonic()
        self.over: Tensor | None = None

    def start(self, given: int, ends: list[int]) -> None:
        """Start a batch: its documents have `given` tokens, and a row ends at any of `ends`."""
        self.batch, self.ends, self.over = given, torch.tensor(ends), None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        ended = torch.isin(input_ids[:, -1].cpu(), self.ends)
        self.over = ended if self.over is None else self.over | ended
        live = int((~self.over).sum())
        self.batch += live
        if time.monotonic() - self.reported > seconds_between_lines():
            self.report(min(self.kept + self.batch, self.most))
        return torch.full((len(input_ids),), live <= len(input_ids) * 3 // 4, device=input_ids.device)

    def report(self, written: int) -> None:
        """Report progress at `written` tokens. The number can fall at the end of a batch, because part of it is
        dropped, so the maximum is reported."""
        written = self.told = max(self.told, written)
        self.reported = time.monotonic()
        speed = written / max(self.reported - self.started, 1e-3)
        left = max(self.wanted - written, 0) / max(speed, 1e-3)
        time_left = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        counts = f"{written:,} of {self.wanted:,} tokens"
        self.progress(f"self text: {counts}, {speed:,.0f} tok/s, {time_left} left")


class _Writer:
    """Samples documents in batches until a number of tokens is reached; use it only inside `_sampling`."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sample_length: int,
        batch_size: int,
        temperature: float,
        pace: _Pace,
    ) -> None:
        self.teacher, self.sample_length, self.batch_size, self.pace = teacher, sample_length, batch_size, pace
        self.temperature = temperature
        self.start = start_token(tokenizer)
        # A text ends at the model's own end tokens, and at the start token of the next text (a separator of web texts).
        own = teacher.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        self.ends = sorted({i for i in [*own, tokenizer.eos_token_id, self.start] if i is not None})

    def texts(self, wanted: int) -> list[list[int]]:
        """Write documents from the start token, `wanted` tokens in total."""

        def batch(rows: int) -> list[list[int]]:
            prompts = [[self.start]] * rows
            answers = self._continue(prompts, self.sample_length - 1, self.ends)
            return [[self.start, *answer] for answer in answers if answer[0] not in self.ends]

        documents = self._fill(wanted, batch)
        if sum(map(len, documents)) < wanted:
            raise ModelError(
                f"{self.teacher.config.name_or_path or 'the teacher'} ends every text at once, so it cannot "
                "write its own training data: set data.source to a file or a data set"
            )
        return documents

    def conversations(self, chat: ChatPieces, wanted: int) -> list[list[int]]:
        """Write questions and answers, `wanted` tokens in total; fewer or none if the teacher writes no questions."""
        room = min(LONGEST_QUESTION, (self.sample_length - len(chat.before) - len(chat.after)) // 2)
        if room < SHORTEST_QUESTION:
            return []
        turn_ends = sorted({*self.ends, chat.after[0]})

        def batch(rows: int) -> list[list[int]]:
            questions = self._continue([chat.before] * rows, room, turn_ends)
            # Drop questions that were cut off by the length limit, because their answers are no examples.
            finished = [q[:-1] for q in questions if len(q) > 1 and q[-1] in turn_ends]
            prompts = [chat.before + question + chat.after for question in finished]
            if not prompts:
                return []
            answers = self._continue(prompts, self.sample_length - max(map(len, prompts)), self.ends)
            return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

        return self._fill(wanted, batch)

    def _fill(self, wanted: int, batch: Callable[[int], list[list[int]]]) -> list[list[int]]:
        """Run batches until `wanted` tokens exist and cut the last document to fit; fewer tokens if batches come back
        empty."""
        documents: list[list[int]] = []
        missing, empty = wanted, 0
        while missing > 0 and empty < _EMPTY_BATCHES:
            # The last batches need fewer rows: estimate their number from the mean document length, plus a third.
            typical = (wanted - missing) / len(documents) if documents else self.sample_length
            rows = self.batch_size if empty else min(self.batch_size, int(missing / typical * 4 / 3) + 1)
            self.pace.most = self.pace.kept + missing
            new = batch(rows)
            empty = 0 if new else empty + 1
            for document in new:
                if missing > 0:
                    documents.append(document[:missing])
                    self.pace.kept += len(documents[-1])
                    missing -= len(documents[-1])
            self.pace.report(self.pace.kept)
        return documents

    def _continue(self, prompts: list[list[int]], new_tokens: int, ends: list[int]) -> list[list[int]]:
        """Continue each prompt by at most `new_tokens` ids; the last id is in `ends` if the teacher ended the text.

        `generate()` computes ended rows until the longest row ends. So each time a quarter of the rows have ended, they
        are removed from the batch and the cache.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        live, room = list(range(len(prompts))), new_tokens
        width, device = max(map(len, prompts)), self.teacher.device
        ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        from linearize.data.writing import growing_cache

        cache = growing_cache(self.teacher)
        while live and room > 0:
            self.pace.start(sum(map(len, prompts)) + sum(map(len, answers)), ends)
            out = self._generate(ids, mask, cache, room, ends)
            new = out[:, ids.shape[1] :].tolist()
            room -= len(new[0])
            for row, added in zip(live, new, strict=True):
                answers[row] += _up_to_end(added, ends)
            kept = [place for place, row in enumerate(live) if answers[row][-1] not in ends]
            live = [live[place] for place in kept]
            chosen = torch.tensor(kept, dtype=torch.long, device=device)
            ids = out[chosen]
            mask = torch.nn.functional.pad(mask[chosen], (0, ids.shape[1] - mask.shape[1]), value=1)
            cache.batch_select_indices(chosen)
        return answers

    def _generate(self, ids: Tensor, mask: Tensor, cache: DynamicCache, new_tokens: int, ends: list[int]) -> Tensor:
        """One call of `generate()` that continues `cache`: returns `ids` and the new ids, padded after an end."""
        out: Tensor = self.teacher.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([self.pace]),
        )
        return out


def _up_to_end(row: list[int], ends: list[int]) -> list[int]:
    """`row` up to and including its first id in `ends`."""
    return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """Find the tokens around a user's text by rendering the chat template; None if the template cannot be cut there.

    It can be cut if the text appears once, unchanged, and a special token follows it, because this token ends the
    question that the model writes.
    """
    if not tokenizer.chat_template:
        return None
    turn = [{"role": "user", "content": _PLACEHOLDER}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if text.count(_PLACEHOLDER) != 1:
        return None
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(_PLACEHOLDER))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ChatPieces(before, after) if before and after and after[0] in special else None


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after which the model expects an unrelated text.

    It is BOS, or EOS without a BOS. If these also mark the turns of a chat (SmolLM2's BOS opens each turn), it is the
    first special token that does not, the separator of the pretraining text.
    """
    turns: list[int] = []
    if tokenizer.chat_template:
        conversation = [{"role": role, "content": _PLACEHOLDER} for role in ("user", "assistant", "user")]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        turns = tokenizer(text, add_special_tokens=False).input_ids
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    present: list[int] = [i for i in [*named, *sorted(tokenizer.all_special_ids)] if i is not None]
    if not present:
        raise ModelError(
            "the tokenizer has no special token from which the model could start to write: use a data file"
        )
    # A BOS that opens the conversation occurs once; a marker of turns occurs more often.
    return next((i for i in present if turns.count(i) < 2), present[0])


@contextmanager
def _sampling(teacher: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed the generators, set eval mode, and use a bare generation config, because the model's own may set a top-p or
    a repetition penalty."""
    # A lazy import, because it imports transformers' models, which reading data does not need.
    from linearize.data.writing import grouped_attention

    was_training, own = teacher.training, teacher.generation_config
    bare = GenerationConfig()
    bare.eos_token_id = copy.copy(own.eos_token_id)
    teacher.generation_config = bare
    teacher.eval()
    # `generate()` accepts no `torch.Generator`, so seed the global one and restore it afterwards.
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        try:
            with grouped_attention(teacher):
                yield
        finally:
            teacher.generation_config = own
            teacher.train(was_training)


def _read(path: Path) -> list[list[int]] | None:
    """Read the documents in `path`; None if the file is missing or damaged, because it can be written again."""
    # For a damaged file safetensors raises its own exception, which is not an OSError; `split` raises for a wrong
    # length.
    with suppress(Exception):
        stored = load_file(path)
        return [part.tolist() for part in stored["tokens"].split(stored["lengths"].tolist())]
    return None


def _write(path: Path, documents: list[list[int]]) -> None:
    """Write `documents` atomically."""
    flat = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    with claimed(path, wait=True), staged_file(path) as staging:  # another run may be writing the same file
        save_file({"tokens": torch.tensor(flat, dtype=torch.int32), "lengths": torch.tensor(lengths)}, staging)
