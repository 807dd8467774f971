"""The measurement. Models run in turns at every length, so a slowdown of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from linearize.benchmark.subjects import full_cache
from linearize.generation.engine import CudaGraphs, Engine
from linearize.generation.sampling import Sampling
from linearize.generation.state import State
from linearize.report.formatting import readable_bytes
from linearize.runtime.memory import PeakMemory, free_bytes, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.benchmark.subjects import Subject

TEACHERS = ("teacher", "teacher-graph", "teacher-onednn")
# The share of free memory that a cache may take.
_SAFE = 0.9
# The maximum of a run of decoding steps, apart from its minimum of two steps.
_LONGEST_RUN = 3.0


def decode(
    subjects: Sequence[Subject],
    batch: int,
    tokens: int,
    *,
    steps: int,
    repeats: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for each subject: tokens per second when decoding one token at a time after `tokens` of context."""
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        row: dict[str, Any] = {"kind": "decode", "system": subject.name, "batch": batch, "tokens": tokens}
        if (reason := _refusal(subject, batch, tokens)) is not None:
            rows[subject.name] = {**row, "skipped": reason}
            continue
        cache = subject.filled_cache(batch, tokens)
        kind = _Engine if subject.converted else _Graph if subject.graph else _Decoding
        decoding = kind(subject, cache, batch, steps)
        row |= {"cache_bytes": subject.cache_bytes(cache), "step_bytes": subject.step_bytes(cache, batch)}
        with PeakMemory(subject.model.device) as peak:
            decoding.warm_up()
        row |= {"peak_bytes": peak_bytes(subject, peak, row["cache_bytes"]), "steps": decoding.steps}
        rows[subject.name], runs[subject.name] = row, decoding
    in_turns(runs, rows, repeats, batch)
    say(told(rows, tokens, batch))
    return list(rows.values())


def prefill(
    subjects: Sequence[Subject], batch: int, tokens: int, *, repeats: int, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each subject: tokens per second when reading `tokens` and decoding a first one. The teacher reads it
    at once, a converted model in chunks, as in `generate`."""
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        if subject.graph:
            continue  # its prefill is the teacher's
        row: dict[str, Any] = {"kind": "prefill", "system": subject.name, "batch": batch, "tokens": tokens}
        if (reason := _refusal(subject, batch, tokens)) is not None:
            rows[subject.name] = {**row, "skipped": reason}
            continue
        reading = _Reading(subject, batch, tokens)
        with PeakMemory(subject.model.device) as peak:
            reading()
        row |= {"cache_bytes": reading.cache_bytes, "peak_bytes": peak_bytes(subject, peak)}
        rows[subject.name], runs[subject.name] = row, reading
    in_turns(runs, rows, repeats, batch)
    for row in rows.values():
        if "seconds" in row:
            row["first_token_seconds"] = statistics.median(row["seconds"])
    say(told(rows, tokens, batch))
    return list(rows.values())


def ahead_from(rows: Sequence[dict[str, Any]], kind: str, batch: int, system: str = "model") -> int | None:
    """The shortest measured length from which the model is faster than its teacher (the fastest variant of it), at this
    length and all longer ones. A length at which the teacher does not fit counts as faster. None if there is none."""
    speeds: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == kind and row["batch"] == batch:
            speeds.setdefault(row["tokens"], {})[row["system"]] = row.get("tokens_per_second", 0.0)
    found = None
    for tokens in sorted(speeds, reverse=True):
        here = speeds[tokens]
        teachers = [speed for name, speed in here.items() if name in TEACHERS]
        if system not in here or not teachers or here[system] <= max(teachers):
            break
        found = tokens
    return found


class Run(ABC):
    """A timed piece of work of one model. A call returns the number of tokens processed per sequence."""

    subject: Subject

    @abstractmethod
    def __call__(self) -> int: ...


class _Decoding(Run):
    """Decodes `steps` tokens greedily, and crops them from the cache afterwards."""

    def __init__(self, subject: Subject, cache: DynamicCache, batch: int, steps: int) -> None:
        self.subject, self.cache, self.steps = subject, cache, steps
        self.first = torch.zeros(batch, 1, dtype=torch.long, device=subject.model.device)

    def warm_up(self) -> None:
        self._run(1)
        began = time.perf_counter()
        self._run(1)
        wait_for(self.subject.model.device)
        self.steps = max(2, min(self.steps, int(_LONGEST_RUN / (time.perf_counter() - began))))

    def __call__(self) -> int:
        self._run(self.steps)
        return self.steps

    @torch.inference_mode()
    def _run(self, steps: int) -> None:
        token = self.first
        for _ in range(steps):
            logits = self.subject.model(token, past_key_values=self.cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        for layer in self.cache.layers:
            if not layer.is_sliding:
                layer.crop(-steps)


class _Engine(_Decoding):
    """Decoding with the engine, for a converted model. Nothing is cropped, because its memory does not grow."""

    def __init__(self, subject: Subject, cache: DynamicCache, batch: int, steps: int) -> None:
        super().__init__(subject, cache, batch, steps)
        self.state, self.engine = State(cache, self.first), Engine(subject.model)
        self.engine.forget()  # so each length allocates its own buffers

    def _run(self, steps: int) -> None:
        self.engine.generate(Sampling(steps), state=self.state, owned=True)


class _Graph(_Decoding):
    """A teacher's decoding step as a CUDA graph; see `full_cache`."""

    def __init__(self, subject: Subject, cache: DynamicCache, batch: int, steps: int) -> None:
        super().__init__(subject, full_cache(cache), batch, steps)
        self.token = self.first.clone()
        self.step: Callable[[], None] | None = None

    def _work(self) -> None:
        logits = self.subject.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    @torch.inference_mode()
    def _run(self, steps: int) -> None:
        if self.step is None:
            device = self.token.device
            self.step = CudaGraphs(device)(self._work) if device.type == "cuda" else self._work
        for _ in range(steps):
            self.step()


class _Reading(Run):
    """Reads a text into an empty cache and picks the first new token."""

    def __init__(self, subject: Subject, batch: int, tokens: int) -> None:
        self.subject = subject
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, subject.base.vocab_size, (batch, tokens), generator=generator)
        self.text = drawn.to(subject.model.device)
        self.cache_bytes = 0

    def __call__(self) -> int:
        model = self.subject.model
        if self.subject.converted:
            written = Engine(model).generate(Sampling(1), self.text, keep=True)
            assert written.state is not None  # noqa: S101 - for the type checker
            cache = written.state.cache
        else:
            cache = DynamicCache(config=self.subject.base)
            with torch.inference_mode():
                model(self.text, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        self.cache_bytes = self.subject.cache_bytes(cache)
        return self.text.shape[1]


def in_turns(runs: dict[str, Run], rows: dict[str, dict[str, Any]], repeats: int, batch: int) -> None:
    """Time every run `repeats` times, all runs once per round, and add the medians to the rows."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, int] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            device = run.subject.model.device
            wait_for(device)
            began = time.perf_counter()
            counts[name] = run()
            wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        rows[name] |= {"seconds": times, "tokens_per_second": batch * counts[name] / statistics.median(times)}


def _refusal(subject: Subject, batch: int, tokens: int) -> str | None:
    return refusal("its cache", subject.needs(batch, tokens), subject.model.device, tokens)


def refusal(what: str, needs: int, device: torch.device, tokens: int) -> str | None:
    """The reason to skip a length at which `what` takes `needs` bytes, with a length that fits; None if it fits."""
    free = free_bytes(device)
    if needs <= _SAFE * free:
        return None
    fits = int(_SAFE * free / (needs / tokens))
    return (
        f"{what} needs about {readable_bytes(needs)} and {readable_bytes(free)} are free; "
        f"{fits:,} tokens would fit, or more with fewer --layers or a smaller --batches"
    )


def peak_bytes(subject: Subject, peak: PeakMemory, cache_bytes: int = 0) -> int | None:
    """Peak bytes: weights, a cache that existed before, and the growth of memory."""
    return None if peak.bytes is None else subject.weights_bytes + cache_bytes + peak.bytes


def told(rows: dict[str, dict[str, Any]], tokens: int, batch: int) -> str:
    """A line with the speeds at one length."""
    found = next(iter(rows.values()))["kind"]
    speeds = ", ".join(
        f"{name} {row['tokens_per_second']:,.1f} tok/s" if "seconds" in row else f"{name} does not fit"
        for name, row in rows.items()
    )
    return f"{found} at {tokens:,} tokens, batch {batch}: {speeds}"
