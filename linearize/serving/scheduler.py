"""Write many texts at once: the states of all conversations are the rows of one batch.

A state has a fixed size, so a conversation joins the batch as one more row and leaves it as one less; there are no
pages to manage. Each turn of the loop reads one piece of one waiting prompt, and then writes one token of every row, so
a long prompt delays the others by a piece at a time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from linearize.errors import is_out_of_memory
from linearize.generation.prompt import prefill_chunk
from linearize.generation.statefile import empty_memories
from linearize.generation.stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from linearize.generation.decoding import Decoding
    from linearize.model.memory import LayerMemory

_LOG = logging.getLogger("linearize")
_CLOSING = "the server is shutting down"
_SHARE = 8  # while others write, a piece of a prompt is this part of its usual length


@dataclass(eq=False)
class Job:
    """One text to continue.

    Attributes:
        ids: the prompt's tokens.
        decoding: how to write.
        tell: called in the scheduler's thread with each new piece of text, and with None at the end.
        goes_on: True if the text goes on from the prompt; an answer in a chat is a text of its own.
        cancelled: set by any thread; the scheduler then drops the job.
        new_tokens: tokens written so far, an end token included.
        finish: `stop` or `length` once the text has ended; None before, and if it failed or was cancelled.
        error: the reason of a failure; None without one.
    """

    ids: list[int]
    decoding: Decoding
    tell: Callable[[str | None], None]
    goes_on: bool = False
    cancelled: bool = False
    new_tokens: int = 0
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class _Row:
    """A job that is read or written, with the state of its sampling and its text."""

    job: Job
    sampling: Any
    stream: TextStream
    generator: torch.Generator
    layers: list[LayerMemory]  # only while the prompt is read
    read: int = 0
    there: Tensor | None = None
    written: Tensor | None = None
    last: int = 0


@dataclass(eq=False)
class _Batch:
    """The rows that write, and their memories: one `LayerMemory` of all rows per layer."""

    rows: list[_Row] = field(default_factory=list)
    layers: list[LayerMemory] = field(default_factory=list)


class Scheduler:
    """A thread that owns the model.

    Args:
        model: a converted model.
        rows: the maximum number of texts that are written at once; others wait in the order of their arrival.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._head: Job | None = None  # the job whose prompt is read
        self._reading: _Row | None = None  # its row, once there is one
        self._batch = _Batch()
        self._closed, self._door = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="linearize-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; its `tell` is called until it has ended."""
        with self._door:
            closed = self._closed
            if not closed:
                self._arrived.put(job)
        if closed:
            self._end(job, error=_CLOSING)

    @property
    def alive(self) -> bool:
        """False if the thread has ended."""
        return self._thread.is_alive()

    @property
    def pending(self) -> int:
        """Jobs that are not in the batch yet, approximately."""
        return self._arrived.qsize() + len(self._waiting)

    def stop(self) -> None:
        """End all jobs soon; a signal handler may call it."""
        self._closed = True
        self._arrived.put(None)

    def close(self) -> None:
        """End all jobs and the thread."""
        self.stop()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        finally:
            with self._door:  # also after an exception: no job may arrive after the last look at the queue
                self._closed = True
            self._end_all()

    def _loop(self) -> None:
        while not self._closed:
            self._collect()
            try:
                self._read_piece()
            except Exception as error:
                self._fail(error, self._head)
                self._head = self._reading = None
            try:
                self._step()
            except Exception as error:
                self._fail(error, *(row.job for row in self._batch.rows))
                self._batch = _Batch()

    def _end_all(self) -> None:
        while not self._arrived.empty():
            if (job := self._arrived.get()) is not None:
                self._waiting.append(job)
        for left in (*self._waiting, self._head, *(row.job for row in self._batch.rows)):
            if left is not None:
                self._end(left, error=_CLOSING)

    def _collect(self) -> None:
        """Take in new jobs, and wait for one if there is nothing to do. Drops cancelled ones that do not write yet."""
        idle = not (self._waiting or self._head or self._batch.rows)
        while True:
            try:
                job = self._arrived.get(block=idle)
            except queue.Empty:
                break
            if job is None:
                return
            self._waiting.append(job)
            idle = False
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._end(job)
        if self._head is not None and self._head.cancelled:
            self._end(self._head)
            self._head = self._reading = None

    def _fail(self, error: Exception, *jobs: Job | None) -> None:
        """End the jobs that an exception concerns; the server goes on."""
        reason = "out of memory" if is_out_of_memory(error) else str(error).strip().partition("\n")[0]
        _LOG.error("linearize: a step failed", exc_info=error)
        for job in jobs:
            if job is not None and job.finish is None:
                self._end(job, error=reason or type(error).__name__)

    def _read_piece(self) -> None:
        """Read the next piece of the prompt at the head of the queue; after the last one the text joins the batch."""
        if self._head is None:
            if not self._waiting or len(self._batch.rows) >= self.rows:
                return
            self._head = self._waiting.popleft()
        self._reading = self._reading or self._begun(self._head)
        row, device = self._reading, self.model.device
        length = prefill_chunk(device, _SHARE if self._batch.rows else 1)
        ids = row.job.ids[row.read : row.read + length]
        piece = torch.tensor([ids], dtype=torch.long, device=device)
        out = self.model(piece, past_key_values=_cache(row.layers), use_cache=True, logits_to_keep=1)
        row.read += len(ids)
        if row.read < len(row.job.ids):
            return
        if self._choose([row], out.logits[:, -1].float()):
            layers = (
                zip(self._batch.layers, row.layers, strict=True) if self._batch.rows else ((x,) for x in row.layers)
            )
            self._batch.layers = [joined(memories) for memories in layers]
            self._batch.rows.append(row)
            row.layers = []
        self._head = self._reading = None

    def _begun(self, job: Job) -> _Row:
        sampling, device = job.decoding.sampling(self.model, self.tokenizer), self.model.device
        vocabulary = self.model.get_output_embeddings().out_features
        row = _Row(
            job,
            sampling,
            TextStream(self.tokenizer, job.decoding.stop, before=job.ids if job.goes_on else ()),
            torch.Generator(device).manual_seed(job.decoding.seed),
            empty_memories(self.model, 1),
        )
        if sampling.repetition_penalty != 1:
            shown = torch.tensor([job.ids], device=device)
            row.there = torch.zeros(1, vocabulary, dtype=torch.bool, device=device).scatter_(1, shown, True)
        if sampling.counts_written:
            row.written = torch.zeros(1, vocabulary, device=device)
        return row

    def _step(self) -> None:
        """Write one token of every row that is not cancelled."""
        self._keep([row for row in self._batch.rows if not row.job.cancelled])
        batch = self._batch
        if not batch.rows:
            return
        last = torch.tensor([[row.last] for row in batch.rows], dtype=torch.long, device=self.model.device)
        out = self.model(last, past_key_values=_cache(batch.layers), use_cache=True)
        self._keep(self._choose(batch.rows, out.logits[:, -1].float()))

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[_Row]:
        """Choose the next token of each row, pass its text on, and return the rows that go on."""
        new = torch.cat(
            [
                row.sampling.choose(own[None], row.there, own[None], row.written, row.generator)
                for row, own in zip(rows, logits, strict=True)
            ]
        )
        return [row for row, token in zip(rows, new.tolist(), strict=True) if self._goes_on(row, token)]

    def _goes_on(self, row: _Row, token: int) -> bool:
        job, row.last = row.job, token
        job.new_tokens += 1
        if row.there is not None:
            row.there[0, token] = True
        if row.written is not None:
            row.written[0, token] += 1
        ended = token in row.sampling.eos
        piece = row.stream.put(token)
        if ended or row.stream.stopped or job.new_tokens >= row.sampling.max_new_tokens:
            piece += row.stream.end()
            job.finish = "stop" if ended or row.stream.stopped else "length"
        if piece:
            job.tell(piece)
        if job.finish is not None:
            self._end(job)
        return job.finish is None

    def _keep(self, rows: list[_Row]) -> None:
        """Drop the memories of all rows of the batch but these."""
        batch = self._batch
        if len(rows) == len(batch.rows):
            return
        for row in batch.rows:
            if row not in rows and row.job.finish is None:
                self._end(row.job)
        indices = torch.tensor([batch.rows.index(row) for row in rows], device=self.model.device)
        layers = [selected(layer, indices) for layer in batch.layers] if rows else []
        self._batch = _Batch(rows, layers)

    def _end(self, job: Job, error: str | None = None) -> None:
        job.error = error
        job.tell(None)


def joined(memories: Sequence[LayerMemory]) -> LayerMemory:
    """One layer's memories as one, with the rows of all."""
    if len(memories) == 1:
        return memories[0]
    named = [dict(memory.tensors()) for memory in memories]
    tensors = {}
    for name in named[0]:
        parts = [tensors_of[name] for tensors_of in named]
        if name.startswith("softmax."):
            longest = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, 0, 0, 0, 0, longest - part.shape[1])) for part in parts]
        tensors[name] = torch.cat(parts)
    return memories[0].holding(tensors)


def selected(memory: LayerMemory, indices: Tensor) -> LayerMemory:
    """One layer's memory of the rows `indices`; a cache that grows is cut to their longest text."""
    longest = int(memory.counts[indices.to(memory.counts.device)].max())
    tensors = {name: tensor[indices.to(tensor.device)] for name, tensor in memory.tensors()}
    return memory.holding(
        {name: tensor[:, :longest] if name.startswith("softmax.") else tensor for name, tensor in tensors.items()}
    )


def _cache(layers: Sequence[LayerMemory]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache
