"""Decode with a converted model: the loop of transformers' `generate`, without its per-token Python overhead.

A converted model's memory has a fixed size, so each step runs the same kernels on the same buffers, however long the
text is. On a GPU a step is recorded once per batch size as a CUDA graph and replayed for every token. A replay has no
Python and no separate kernel launches, and the host reads a token while later steps run, so no step waits for the host.
On other devices, and for models that keep softmax over the whole past, the same step runs eagerly.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from linearize.errors import DataError
from linearize.generation.blocks import blocks_of
from linearize.generation.prompt import prepared, read_through, without_last
from linearize.generation.state import State
from linearize.model.attention import LinearizedAttention
from linearize.model.landmarks.slots import merges
from linearize.model.memory import recount
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import DynamicCache

    from linearize.generation.blocks import Blocks
    from linearize.generation.sampling import Sampling

# Steps that the host launches ahead of the oldest token that it has not read yet.
_AHEAD = 3
_WARM_UP = 3
_LOG = logging.getLogger("linearize")


class Recorder(Protocol):
    """Record work on fixed buffers and return a function that replays it."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]: ...


@dataclass(frozen=True)
class Written:
    """The generated tokens.

    Attributes:
        tokens: `[B, N]`, padded after the end of a row.
        state: the state after the tokens, each row up to its own last token; None if `keep` was False.
    """

    tokens: Tensor
    state: State | None


class CudaGraphs:
    """Record work as CUDA graphs. The graphs share scratch memory, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with _on(self.device):
            return self._record(work)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        random = torch.cuda.get_rng_state(self.device)
        side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):  # triton compiles and checks kernels; cuBLAS picks its own
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        torch.cuda.set_rng_state(random, self.device)
        return graph.replay


@dataclass
class _Rows:
    """The fixed buffers of B rows: all tensors that a step reads and writes, except the weights.

    Attributes:
        state: the memories, and the last tokens, which the next step reads.
        alive: `[B, 1, 1, 1]` 1 for rows that go on; the attention mask of the step.
        logits: `[B, vocabulary]`, float32.
        told: `[2, B]` the step's output for the host: the new tokens, and 1 for rows that go on.
        there: `[B, vocabulary]` True for tokens that already occurred; only allocated for a repetition penalty.
        written: `[B, vocabulary]` how often each token was written; only allocated for penalties on that.
        ends: rule -> end tokens; kept because recorded graphs read these tensors by address.
        recorded: part of a step -> its replay function.
        weights: addresses of the weights at recording time.
        blocks: the layers' short forms, which recorded steps run; None for the base model's own.
    """

    state: State
    alive: Tensor
    logits: Tensor
    told: Tensor
    there: Tensor | None = None
    written: Tensor | None = None
    ends: dict[Sampling, Tensor] = field(default_factory=dict)
    recorded: dict[Any, Callable[[], None]] = field(default_factory=dict)
    weights: tuple[int, ...] = ()
    blocks: Blocks | None = None

    @classmethod
    def around(cls, cache: DynamicCache, batch: int, model: Any) -> _Rows:
        device, vocabulary = model.device, model.get_output_embeddings().out_features
        return cls(
            state=State(cache, torch.zeros(batch, 1, dtype=torch.long, device=device)),
            alive=torch.ones(batch, 1, 1, 1, dtype=torch.long, device=device),
            logits=torch.zeros(batch, vocabulary, device=device),
            told=torch.zeros(2, batch, dtype=torch.long, device=device),
        )

    def forward(self, model: Any, *, masked: bool, merges: bool | None = None) -> None:
        """Feed the last tokens to the model; if `masked`, only of rows that go on. `merges` as in `LayerMemory`."""
        mask = self.alive if masked else None
        for layer in self.state.layers:
            layer.merges = merges
        cache = self.state.cache
        with self.blocks or nullcontext():
            out = model(input_ids=self.state.last, attention_mask=mask, past_key_values=cache, use_cache=True)
        self.logits.copy_(out.logits[:, -1])

    def choose(self, sampling: Sampling) -> None:
        """Sample the next tokens, and mark rows that end."""
        ends, last, alive = self.ends[sampling], self.state.last, self.alive.view(-1)
        goes_on = alive > 0
        there = self.there if sampling.repetition_penalty != 1 else None
        new = sampling.choose(self.logits, there, last, self.written if sampling.counts_written else None)
        if self.there is not None:
            self.there.scatter_(1, new[:, None], True)
        if self.written is not None:
            self.written.scatter_add_(1, new[:, None], torch.ones_like(self.written[:, :1]))
        self.told[0] = new.masked_fill(~goes_on, sampling.pad)
        last.copy_(torch.where(goes_on, new, last[:, 0])[:, None])
        alive.mul_((last != ends).all(1))
        self.told[1] = alive


class _Step(NamedTuple):
    """The parts of a decoding step. `merging` replaces `forward` for tokens that merge a block into landmarks; None if
    `forward` does that."""

    forward: Callable[[], None]
    merging: Callable[[], None] | None
    choose: Callable[[], None]


# Buffers of the last batch size of each model. A running generation pops its buffers, so no other call can reuse them.
_ROWS: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()


class Engine:
    """Generate text with a converted model.

    Args:
        model: a converted model, or a `PeftModel` around one.
        recorder: records a step; by default CUDA graphs if all weights are on one GPU, else none.
    """

    def __init__(self, model: Any, recorder: Recorder | None = None) -> None:
        self.model, self.device = model, model.device
        self._recorder = recorder if recorder is not None else _recorder_of(model)

    def generate(
        self,
        sampling: Sampling,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        state: State | None = None,
        owned: bool = False,
        write: Callable[[Tensor], object] | None = None,
        stoppable: bool = False,
        keep: bool = False,
    ) -> Written:
        """Continue B texts. A text stops at the model's last learned position, if it has learned positions.

        Args:
            input_ids, attention_mask: `[B, T]` the prompt, see `State.read`; optional with a state.
            state: the state to continue; it is not changed.
            owned: `state` may be changed, which saves a copy.
            write: called with each step's new tokens `[B]`, on the CPU.
            stoppable: a true value from `write` ends all texts after these tokens; no step runs ahead of `write`.
            keep: return the state after the new tokens.

        Raises:
            DataError, StateError: see `State.read`; also if a text needs more positions than the model has learned.
        """
        sampling = self._within_positions(sampling, input_ids, attention_mask, state)
        # Buffers outlive the caller's inference mode, so create them outside of it.
        with _on(self.device), torch.inference_mode(False), torch.no_grad():
            rows, recorded, ready = self._placed(sampling, input_ids, attention_mask, state, owned=owned)
            with torch.inference_mode():
                ahead = _AHEAD if recorded is not None and not stoppable else 1
                tokens = self._loop(rows, sampling, write, keep=keep, recorded=recorded, ready=ready, ahead=ahead)
            after = rows.state if keep else None
            if recorded is not None:
                recount(rows.state.layers)  # replayed steps update the counts only on the device
                after = rows.state.fork() if keep else None
                _ROWS[self.model] = rows
            return Written(tokens.to(self.device), after)

    def _within_positions(
        self, sampling: Sampling, input_ids: Tensor | None, attention_mask: Tensor | None, state: State | None
    ) -> Sampling:
        """Limit `sampling.max_new_tokens` to the model's learned positions."""
        learned = learned_positions(self.model)
        if learned is None:
            return sampling
        longest = 0 if state is None else int(state.tokens.max())
        if input_ids is not None:
            longest += input_ids.shape[1] if attention_mask is None else int((attention_mask != 0).sum(1).max())
        if longest > learned:
            raise DataError(
                f"a text has {longest:,} tokens and the model has learned {learned:,} positions; shorten it"
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, learned - longest))

    def forget(self) -> None:
        """Free the buffers kept for the next text."""
        _ROWS.pop(self.model, None)

    def _placed(
        self,
        sampling: Sampling,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        state: State | None,
        *,
        owned: bool,
    ) -> tuple[_Rows, _Step | None, bool]:
        """Read the prompt. Returns the buffers, the recorded step, and True if the buffers hold the prompt's last
        logits."""
        ids = input_ids if input_ids is not None else state.last[:, :0] if state is not None else None
        if ids is None:
            raise ValueError("give input_ids or a state")
        rows = _ROWS.pop(self.model, None) if self._recorder is not None else None
        if rows is not None and (rows.state.last.shape[0] != len(ids) or rows.weights != _addresses(self.model)):
            rows = None  # frees its memory before new buffers are allocated
        into = None if rows is None else rows.state.layers
        # Inference-mode tensors cannot be changed in place here, and a cache that grows may be wider than its texts.
        fixed = owned and state is not None and not any(one.past or one.counts.is_inference() for one in state.layers)
        if rows is None and state is not None and fixed:
            into = state.layers
        cache, text, real = prepared(self.model, ids, attention_mask, state, into)
        if rows is None:
            rows = _Rows.around(cache, len(ids), self.model)
        rule = sampling.rule
        if rule not in rows.ends:
            rows.ends[rule] = torch.tensor(rule.eos, dtype=torch.long, device=self.device)
        if sampling.repetition_penalty != 1 and rows.there is None:
            rows.there = torch.zeros(rows.logits.shape, dtype=torch.bool, device=self.device)
        if sampling.counts_written and rows.written is None:
            rows.written = torch.zeros_like(rows.logits)
        recorded = self._record(rows, rule)
        rows.alive.fill_(1)
        last, before, real_before = without_last(text, real)
        rows.state.last.copy_(last)
        if rows.there is not None:
            shown = text if real is None else torch.where(real != 0, text, last)
            rows.there.zero_().scatter_(1, shown.to(self.device), True)
        if rows.written is not None:
            rows.written.zero_()
        # If all rows end in the last column, reading the whole prompt gives their logits; else the first step computes
        # them.
        ready = text.shape[1] > 1 and sampling.max_new_tokens > 0 and (real is None or bool(real[:, -1].all()))
        logits = read_through(self.model, cache, *((text, real) if ready else (before, real_before)))
        if ready and logits is not None:
            rows.logits.copy_(logits)
        return rows, recorded, ready

    def _record(self, rows: _Rows, rule: Sampling) -> _Step | None:
        """The functions that replay a step; None if a step runs eagerly."""
        if self._recorder is None or any(layer.past for layer in rows.state.layers):
            return None
        works: dict[Any, Callable[[], None]] = {
            "forward": lambda: rows.forward(self.model, masked=True, merges=False),
            rule: lambda: rows.choose(rule),
        }
        if _landmarks(self.model):
            works["merging"] = lambda: rows.forward(self.model, masked=True, merges=True)
        if "forward" not in rows.recorded:
            rows.blocks = blocks_of(self.model)
        rows.alive.zero_()  # masks all rows, so recording writes nothing into the memory
        for layer in rows.state.layers:
            layer.stay()
            layer.counts_on_host = False
        try:
            for name, work in works.items():
                if name not in rows.recorded:
                    rows.recorded[name] = self._recorder(work)
        except RuntimeError as error:
            self._recorder = None
            reason = str(error).strip().partition("\n")[0]
            _LOG.warning("linearize: decoding is not recorded as a CUDA graph, which is slower: %s", reason)
            return None
        finally:
            for layer in rows.state.layers:
                layer.counts_on_host = True
                layer.merges = None
        rows.weights = _addresses(self.model)
        return _Step(rows.recorded["forward"], rows.recorded.get("merging"), rows.recorded[rule])

    def _loop(
        self,
        rows: _Rows,
        sampling: Sampling,
        write: Callable[[Tensor], object] | None,
        *,
        keep: bool,
        recorded: _Step | None,
        ready: bool,
        ahead: int,
    ) -> Tensor:
        """Run steps until all rows have ended, or `write` ends them; returns the new tokens `[B, N]`."""
        ended = False
        step = recorded or _Step(
            # Ended rows are masked only if their memory is kept, because a step without a mask is cheaper.
            lambda: rows.forward(self.model, masked=keep and ended),
            None,
            lambda: rows.choose(sampling.rule),
        )
        due = _merges_due(self.model, rows) if step.merging is not None else None
        mail = _Mail(rows.told, ahead)
        written: list[Tensor] = []
        launched = 0
        while len(written) < sampling.max_new_tokens:
            while launched < min(sampling.max_new_tokens, len(written) + mail.room):
                if launched or not ready:
                    merges = due is not None and due(launched - ready)
                    (step.merging if merges and step.merging is not None else step.forward)()
                step.choose()
                mail.send()
                launched += 1
            new, goes_on = mail.receive()
            written.append(new)
            if write is not None and write(new) and ahead == 1:
                break
            ended = not bool(goes_on.all())
            if not bool(goes_on.any()):
                break
        return torch.stack(written, 1) if written else torch.zeros(rows.told.shape[1], 0, dtype=torch.long)


def _landmarks(model: Any) -> list[Any]:
    """The mixers with landmarks, one of each window and number of sinks."""
    mixers = [module.mixer for module in model.modules() if isinstance(module, LinearizedAttention)]
    found = {(m.window, m.config.sinks): m for m in mixers if m is not None and m.config.landmarks}
    return list(found.values())


def _merges_due(model: Any, rows: _Rows) -> Callable[[int], bool]:
    """A function of the number of steps so far: True if the next one may merge a block. A row that has ended stays
    behind its count here, and merges no block."""
    mixers, counts = _landmarks(model), rows.state.layers[0].counts.tolist()

    def due(steps: int) -> bool:
        return any(merges(m, n + steps + 1) > merges(m, n + steps) for m in mixers for n in counts)

    return due


class _Mail:
    """Copy each step's output to the host without a sync, and return the copies in order.

    Args:
        told: the buffer that each step overwrites.
        room: maximum number of copies under way.
    """

    def __init__(self, told: Tensor, room: int) -> None:
        self.told, self.room, self._sent = told, room, 0
        self._apart = told.device.type == "cuda"
        self._slots = [torch.empty(told.shape, dtype=told.dtype, pin_memory=self._apart) for _ in range(room)]
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def send(self) -> None:
        slot, event = self._slots[self._sent % self.room], None
        slot.copy_(self.told, non_blocking=True)
        if self._apart:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.told.device))
        self._under_way.append((slot, event))
        self._sent += 1

    def receive(self) -> tuple[Tensor, Tensor]:
        slot, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        new, goes_on = slot.clone()
        return new, goes_on


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the current GPU; a no-op for other devices."""
    context: AbstractContextManager[None] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    return context


def _recorder_of(model: Any) -> Recorder | None:
    devices = {tensor.device for tensor in model.parameters()}
    return CudaGraphs(devices.pop()) if {device.type for device in devices} == {"cuda"} and len(devices) == 1 else None


def _addresses(model: Any) -> tuple[int, ...]:
    """Addresses of the weights, because a recorded graph reads weights by address."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
