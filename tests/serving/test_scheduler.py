"""Many texts as one batch: each is what it would be alone, whatever joins and leaves beside it."""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.generation.decoding import Decoding
from linearize.generation.text import continue_text
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.serving.scheduler import Job, Scheduler

KINDS = {
    "default": [MixerConfig(layers=[0, 1], window=16)],
    "kept": [
        MixerConfig(layers=[0], window=16, softmax_heads=[0]),
        MixerConfig(layers=[1], window=None, recurrence="none", sinks=0),
    ],
    "landmarks": [MixerConfig(layers=[0, 1], window=16, landmarks=24)],
}
STORY = "Once upon a time there was a little dog who had a red ball and a friend . "
PROMPTS = [STORY, STORY * 5 + "The dog", "The cat", STORY * 2, "Tom and Lily"]
OPTIONS = [
    {"max_new_tokens": 40},
    {"max_new_tokens": 9},
    {"max_new_tokens": 25, "temperature": 2, "top_p": 0.9, "seed": 3},  # a whole number, as JSON may have it
    {"max_new_tokens": 30, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"max_new_tokens": 12},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def models(tiny_folder: Path) -> dict[str, LinearizedForCausalLM]:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    teacher.generation_config.eos_token_id = 1023  # it writes on
    return {
        name: LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), mixers).eval()
        for name, mixers in KINDS.items()
    }


@pytest.fixture
def scheduling(models: dict[str, LinearizedForCausalLM], tokenizer: Any) -> Iterator[Any]:
    """Makes schedulers, and closes them."""
    made: list[Scheduler] = []

    def make(kind: str, rows: int) -> Scheduler:
        made.append(Scheduler(models[kind], tokenizer, rows))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert not one.alive


class Writing:
    """A job and its text."""

    def __init__(self, tokenizer: Any, prompt: str, **options: Any) -> None:
        self.told: queue.Queue[str | None] = queue.Queue()
        self.job = Job(tokenizer(prompt).input_ids, Decoding(**options), self.told.put, goes_on=True)

    def text(self) -> str:
        pieces = []
        while (piece := self.told.get(timeout=300)) is not None:
            pieces.append(piece)
        return "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_what_it_is_alone(models, tokenizer, scheduling, kind, monkeypatch) -> None:
    monkeypatch.setattr("linearize.serving.scheduler.prefill_chunk", lambda *_: 24)
    model, alone = models[kind], []
    for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
        alone.append(continue_text(model, tokenizer, prompt, decoding=Decoding(**options)))
    scheduler = scheduling(kind, rows=3)  # two wait for a place
    writing = [Writing(tokenizer, prompt, **options) for prompt, options in zip(PROMPTS, OPTIONS, strict=True)]
    for one in writing:
        scheduler.submit(one.job)
    texts = [one.text() for one in writing]
    sampled = 2  # drawn from a generator of its own; test_a_seed_is_of_its_text
    for index, (text, found) in enumerate(zip(texts, alone, strict=True)):
        assert index == sampled or (text == found.text and writing[index].job.new_tokens == found.new_tokens)
        assert writing[index].job.finish in ("stop", "length") and writing[index].job.error is None


def test_a_seed_is_of_its_text(tokenizer, scheduling) -> None:
    scheduler = scheduling("default", rows=4)
    options = {"max_new_tokens": 20, "temperature": 1.0}

    def texts(*seeds: int) -> list[str]:
        writing = [Writing(tokenizer, STORY, seed=seed, **options) for seed in seeds]
        for one in writing:
            scheduler.submit(one.job)
        return [one.text() for one in writing]

    (alone,), (other, again, more) = texts(5), texts(6, 5, 7)
    assert alone == again and len({alone, other, more}) == 3


def test_a_stop_string_and_a_cancelled_text_leave_the_others(models, tokenizer, scheduling) -> None:
    model = models["default"]
    whole = continue_text(model, tokenizer, STORY, decoding=Decoding(max_new_tokens=40)).text
    word = whole.split()[5]
    scheduler = scheduling("default", rows=2)
    endless = Writing(tokenizer, PROMPTS[1], max_new_tokens=10**6)
    waits = Writing(tokenizer, PROMPTS[2], max_new_tokens=10**6)
    stopped, plain = (Writing(tokenizer, STORY, max_new_tokens=40, stop=stop) for stop in ((word,), ()))
    scheduler.submit(endless.job)
    endless.told.get(timeout=300)  # it writes
    scheduler.submit(stopped.job)
    scheduler.submit(plain.job)
    scheduler.submit(waits.job)
    waits.job.cancelled = True
    assert stopped.text() == whole[: whole.index(word)] and stopped.job.finish == "stop"
    assert waits.text() == "" and waits.job.finish is None
    assert plain.text() == whole and plain.job.finish == "length"
    endless.job.cancelled = True
    endless.text()
    assert endless.job.finish is None and endless.job.error is None


def test_a_failure_ends_its_texts_and_not_the_server(models, tokenizer, scheduling, monkeypatch) -> None:
    model = models["default"]
    scheduler = scheduling("default", rows=2)
    whole, forward = model.forward, []

    def failing(*arguments: Any, **options: Any) -> Any:
        forward.append(1)
        if len(forward) in (1, 4):  # while a prompt is read, and while a text is written
            raise RuntimeError("no luck\nat all")
        return whole(*arguments, **options)

    monkeypatch.setattr(model, "forward", failing)
    for _ in range(2):
        one = Writing(tokenizer, STORY, max_new_tokens=10)
        scheduler.submit(one.job)
        one.text()
        assert one.job.error == "no luck" and one.job.finish is None
    one = Writing(tokenizer, STORY, max_new_tokens=4)
    scheduler.submit(one.job)
    assert one.text() and one.job.finish == "length"
    last = Writing(tokenizer, STORY, max_new_tokens=10**6)
    scheduler.submit(last.job)
    last.told.get(timeout=300)
    scheduler.close()
    last.text()
    assert last.job.error == "the server is shutting down"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_ends_its_texts(tokenizer, scheduling, monkeypatch) -> None:
    scheduler = scheduling("default", rows=1)
    texts = [Writing(tokenizer, STORY, max_new_tokens=10**6) for _ in range(2)]
    for one in texts:
        scheduler.submit(one.job)
    texts[0].told.get(timeout=300)

    def failing() -> None:
        raise MemoryError

    monkeypatch.setattr(scheduler, "_collect", failing)
    for one in texts:
        one.text()
    late = Writing(tokenizer, STORY)
    scheduler.submit(late.job)
    assert late.text() == "" and all(one.job.error for one in (*texts, late))
