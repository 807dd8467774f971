"""The checks. Each check calls a model in two ways that must agree, and returns their relative error.

The tokens are random, so a check needs no file and no network. Rows are longer than window and sinks, so every part of
the memory is used.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from linearize.checkpoint.sizes import growth_nbytes
from linearize.generation.state import State
from linearize.model.memory import LayerMemory
from linearize.sources.source import DTYPES
from linearize.verification.subject import ROWS, Subject, largest, ratio, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pairs = Iterator[tuple[Tensor, Tensor]]

_DRIFT_CHUNK = 128
_FULL_CHUNKS = (700, 33, 1, 256, 31)
# Call sizes for 100 tokens, and for 1,000 more: one parallel call, then single steps.
_FIRST_100, _NEXT_1000 = (90, *[1] * 10), (970, *[1] * 30)


def _decode(subject: Subject) -> Pairs:
    yield subject.stepped()[0], subject.alone(0)


def _chunks(subject: Subject) -> Pairs:
    window = subject.window
    for sizes in ([7], [window // 2 | 1], [window + 3], [window - 1, 2, 1, window, 5]):
        yield subject.pieces(subject.ids[:1], sizes)[0], subject.alone(0)


def _pads(subject: Subject) -> Pairs:
    model, half = subject.model, subject.tokens // 2 - 1
    first, then = (half, 3), (5, half)  # windows that are full, that are not full, and that fill up during the check
    for side in ("left", "right", "both"):
        tokens, mask = subject.padded(side, (0, 0), first)
        prompt = model(tokens, attention_mask=mask, use_cache=True)
        tokens, more = subject.padded(side, first, then)
        whole = torch.cat([mask, more], 1)
        longer = model(tokens, attention_mask=whole, past_key_values=prompt.past_key_values, use_cache=True)
        ends = [a + b for a, b in zip(first, then, strict=True)]
        last = torch.stack([subject.ids[row, end] for row, end in enumerate(ends)])[:, None]
        whole = torch.cat([whole, torch.ones_like(last)], 1)
        step = model(last, attention_mask=whole, past_key_values=longer.past_key_values, use_cache=True)
        for row, (start, end) in enumerate(zip(first, ends, strict=True)):
            alone = subject.alone(row)
            yield prompt.logits[row][mask[row] > 0], alone[:start]
            yield longer.logits[row][more[row] > 0], alone[start:end]
            yield step.logits[row], alone[end : end + 1]


def _packing(subject: Subject) -> Pairs:
    most = subject.tokens
    documents = list(itertools.pairwise((0, most // 8, most // 8 + 1, most // 4, most)))
    positions = torch.cat([torch.arange(stop - start) for start, stop in documents])[None].to(subject.ids.device)
    rows = subject.ids[:2]
    packed = subject.parallel(rows, position_ids=positions.expand(2, -1))
    for start, stop in documents:
        for row in range(2):
            yield packed[row, start:stop], subject.parallel(rows[row : row + 1, start:stop])[0]


def _batch(subject: Subject) -> Pairs:
    sizes = [subject.tokens // 2, 1, 1, 1]
    for order, forward in (
        ([0, 1, 2], subject.parallel),
        ([2, 2, 1], lambda rows: subject.pieces(rows, sizes)),
    ):
        logits = forward(subject.ids[order])
        for place, row in enumerate(order):
            yield logits[place], subject.alone(row)


def _reorder(subject: Subject) -> Pairs:
    most = subject.tokens
    lengths, more = (most // 2, most // 3, 3), max(most // 8, 8)
    tokens, mask = subject.padded("left", (0, 0, 0), lengths)
    device = tokens.device

    def reordered(held: Any) -> list[int]:
        held.reorder_cache(torch.tensor([2, 0, 0], device=device))
        return [2, 0, 0]

    def repeated(held: Any) -> list[int]:
        held.batch_repeat_interleave(2)
        return [0, 0, 1, 1, 2, 2]

    def selected(held: Any) -> list[int]:
        held.batch_select_indices(torch.tensor([2, 0], device=device))
        return [2, 0]

    for change in (reordered, repeated, selected):
        held = subject.model(tokens, attention_mask=mask, use_cache=True).past_key_values
        rows = change(held)
        copies = [rows[:place].count(row) for place, row in enumerate(rows)]
        # Copies of a row get different continuations, as in beam search.
        ways = [(row + copy) % ROWS for row, copy in zip(rows, copies, strict=True)]
        starts = [lengths[row] for row in rows]
        new = torch.stack([subject.ids[way, start : start + more] for way, start in zip(ways, starts, strict=True)])
        got = subject.pieces(new, [more - 3, 1, 1, 1], held)
        for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if copies[place]:
                beam = torch.cat([subject.ids[row, :start], new[place]])[None]
                yield got[place], subject.parallel(beam)[0, start:]
            else:
                yield got[place], subject.alone(row)[start : start + more]


def _full(subject: Subject) -> tuple[float, str]:
    """One row with all landmarks: in chunks, and its last tokens in single steps, against one parallel call."""
    assert subject.full_tokens is not None  # noqa: S101 - `verify` has looked
    tokens = subject.full_tokens
    ids, ends = subject.random(1, tokens, seed=3), 8
    sizes = [*itertools.islice(itertools.cycle(_FULL_CHUNKS), tokens)]
    sizes = [size for size, end in zip(sizes, itertools.accumulate(sizes), strict=True) if end <= tokens - ends]
    sizes = [*sizes, tokens - ends - sum(sizes), *[1] * ends]
    with subject.full():
        whole, start, apart = subject.parallel(ids).float(), 0, 0.0
        # Compare piece by piece: the logits of thousands of tokens are gigabytes, and one copy is enough.
        for got, _ in subject.read(ids, [size for size in sizes if size]):
            end = start + got.shape[1]
            start, apart = end, max(apart, largest(got.float() - whole[:, start:end]))
    return ratio(apart, largest(whole)), f"{tokens:,} tokens"


def _state(subject: Subject) -> tuple[float, str]:
    read = subject.tokens - 12  # longer than window and sinks, so every part of the memory is filled
    ids, rest = subject.ids[:2, :read], subject.ids[:2, read:]
    state = State.read(subject.model, ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        state.save(path, subject.model)
        loaded = State.load(path, subject.model)
    unbroken, resumed = (
        subject.pieces(torch.cat([held.last, rest], 1), [5, 1], held.cache) for held in (state.fork(), loaded)
    )
    whole = torch.stack([subject.alone(row)[read - 1 :] for row in range(len(ids))])
    apart = relative_error(unbroken, whole)
    # The resumed run must equal the unbroken one exactly; the unbroken one may differ from one forward by the
    # tolerance.
    error = max(relative_error(resumed, unbroken), apart if not apart <= subject.tolerance else 0.0)
    return error, f"{apart:.1e} from one forward"


def _held_bytes(value: Any) -> int:
    """Bytes of every tensor reachable from a cache, independent of the cache's own report."""
    bytes_of: dict[int, tuple[int, int]] = {}
    for tensor in _held_tensors(value):
        whole = tensor.untyped_storage()
        named, _ = bytes_of.get(whole.data_ptr(), (0, 0))
        bytes_of[whole.data_ptr()] = named + tensor.numel() * tensor.element_size(), whole.nbytes()
    # Several tensors can be views of one storage; together they count at most its size.
    return sum(min(named, there) for named, there in bytes_of.values())


def _held_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _held_tensors(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _held_tensors(item)
    elif isinstance(value, (Cache, LayerMemory)):
        yield from _held_tensors(vars(value))


def _memory(subject: Subject) -> tuple[float, str]:
    held, seen, sizes = None, 0, []
    with subject.full():
        for calls in (_FIRST_100, _NEXT_1000):
            for tokens in calls:
                ids, at = subject.random(1, tokens, seed=seen), subject.at(seen, tokens)
                held = subject.model(ids, past_key_values=held, use_cache=True, logits_to_keep=1, **at).past_key_values
                seen += tokens
            sizes.append(_held_bytes(held))
    growth = growth_nbytes(subject.model)
    expected = sizes[0] + growth * sum(_NEXT_1000)
    said = f"{sizes[0]:,} bytes after 100 tokens, {sizes[1]:,} after 1,100"
    kept = f"; the layers and heads that keep softmax add {growth:,} a token" if growth else ""
    return abs(sizes[1] - expected) / expected, said + kept


def _reload(subject: Subject) -> tuple[float, str]:
    reference, keywords = subject.source.arguments()
    again, info = AutoModelForCausalLM.from_pretrained(
        reference, dtype=DTYPES.get(subject.dtype, "auto"), output_loading_info=True, **keywords
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            return math.inf, f"{problem.replace('_', ' ')}: {', '.join(map(str, sorted(info[problem])[:3]))}"
    ours = subject.model.state_dict()
    others = again.eval().to(subject.model.device).state_dict()
    if names := sorted(ours.keys() ^ others.keys()):
        return math.inf, f"only one of two loads has {names[0]}"
    stored = _differs_from_files(subject, ours)
    if differing := stored or [name for name in ours if not torch.equal(ours[name], others[name])]:
        where = "its file" if stored else "a second load"
        return math.inf, f"{differing[0]} differs from {where}, as do {len(differing) - 1} more"
    ids = subject.ids[:1]
    with subject.full():
        error = relative_error(again(ids, use_cache=False).logits, subject.parallel(ids))
    return error, f"{len(ours)} tensors are equal"


def _differs_from_files(subject: Subject, ours: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ from the folder's files under the same name. Two loads that lose a weight in the
    same way agree with each other, so comparing loads is not enough. Tensors stored in another layout, such as the
    experts of some mixtures, have other names and are skipped."""
    folder, differing = Path(subject.source.reference), []
    for file in sorted(folder.glob("*.safetensors")) if subject.source.kind == "folder" else []:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() & ours.keys():
                held = ours[name].cpu()
                if not torch.equal(tensors.get_tensor(name).to(held.dtype), held):
                    differing.append(name)
    return sorted(differing)


def _drift(subject: Subject) -> tuple[float, str]:
    # The text begins with that of `decode`, whose steps are made already; the others go on from a copy of its cache.
    new = subject.random(1, max(0, subject.steps - subject.tokens), seed=2)
    ids = torch.cat([subject.ids[:1], new], 1)[:, : subject.steps]
    stepped, held = subject.stepped()
    single, parallel = State(held, ids[:, -1:]).fork().cache, None
    errors = []
    for start in range(0, subject.steps, _DRIFT_CHUNK):
        chunk = ids[:, start : start + _DRIFT_CHUNK]
        at = subject.at(start, chunk.shape[1])
        whole = subject.model(chunk, past_key_values=parallel, use_cache=True, **at)
        parallel = whole.past_key_values
        steps = [*stepped[start : start + chunk.shape[1], None]]
        for place in range(start + len(steps), start + chunk.shape[1]):
            at = subject.at(place, 1)
            step = subject.model(ids[:, place : place + 1], past_key_values=single, use_cache=True, **at)
            single = step.past_key_values
            steps.append(step.logits[0])
            subject.tick(place + 1, subject.steps)
        expected = whole.logits[0].float()
        errors.append((torch.cat(steps).float() - expected).abs().amax(-1) / expected.abs().max())
    subject.tick(subject.steps, subject.steps)
    error = torch.cat(errors)
    said = f"{float(error.median()):.1e} at half of the {subject.steps:,} steps, {float(error[-1]):.1e} at the last"
    return float(error.max()) if bool(error.isfinite().all()) else math.inf, said


def _worst(pairs: Callable[[Subject], Pairs]) -> Callable[[Subject], tuple[float, str]]:
    return lambda subject: (max(relative_error(a, b) for a, b in pairs(subject)), "")


@dataclass(frozen=True)
class Kind:
    """A kind of check.

    Attributes:
        holds: the property that it checks, as a sentence.
        measure: returns the worst relative error and a detail for the report.
        exact: True if only an error of 0 passes.
        least_tolerance: lower bound of the tolerance.
        only_full: True if the check is left out for models that have all their landmarks in the other checks.
        as_loaded: True if the check needs the weights as on disk, before `awake` raises any. It must not use
            `Subject.alone`, because that is cached.
    """

    holds: str
    measure: Callable[[Subject], tuple[float, str]]
    exact: bool = False
    least_tolerance: float = 0.0
    as_loaded: bool = False
    only_full: bool = False


KINDS = {
    "reload": Kind(
        "Two loads give equal logits, and equal weights, which are those of the files.",
        _reload,
        exact=True,
        as_loaded=True,
    ),
    "decode": Kind("Decoding token by token gives the logits of one parallel forward.", _worst(_decode)),
    "chunks": Kind("Reading a text in chunks of any sizes gives the logits of reading it at once.", _worst(_chunks)),
    "pads": Kind("Pads on either side change no logits, also when a cache is continued.", _worst(_pads)),
    "packing": Kind("Documents packed into a row do not attend to each other.", _worst(_packing)),
    "batch": Kind("The logits of a row do not depend on other rows or on its place in the batch.", _worst(_batch)),
    "reorder": Kind("Reordering, copying or selecting rows of a cache does not change their logits.", _worst(_reorder)),
    "state": Kind("A state saved to a file and loaded continues with equal logits.", _state, exact=True),
    "memory": Kind("Memory does not grow with the text, except where softmax is kept.", _memory, exact=True),
    # A few of thousands of random tokens amplify rounding a hundredfold; one lost token has a larger effect.
    "drift": Kind("Single steps over a long text do not drift from the parallel form.", _drift, least_tolerance=1e-3),
    "full size": Kind(
        "With all its slots: reading in chunks and steps gives the logits of reading at once.",
        _full,
        least_tolerance=1e-3,
        only_full=True,
    ),
}
"""Name -> check, in the order of execution."""
