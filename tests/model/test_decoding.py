"""The decoding engine writes what transformers' `generate` writes, also where a step is recorded and repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from linearize import State
from linearize.generation.engine import Engine
from linearize.generation.sampling import Sampling
from linearize.model import LayerMemory, LinearizedForCausalLM
from tests.model.recorded import AskedError, Recorder
from tests.model.test_layer import DISTINCT, KINDS, converted
from tests.tables import some

NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
RECORDED = [kind for kind, changes in KINDS.items() if "softmax_heads" not in changes and kind != "softmax layer"]


def theirs(model: LinearizedForCausalLM, tokens: Tensor, mask: Tensor, **options: object) -> Tensor:
    return model.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :]


def sampling(model: LinearizedForCausalLM, **options: object) -> Sampling:
    found = Sampling.of(model.generation_config, options)
    assert found is not None
    return found


def unequal(ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on the left."""
    width = max(lengths)
    tokens, mask = torch.full((len(lengths), width), 3), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, width - length :], mask[row, width - length :] = ids[row % len(ids), :length], 1
    return tokens, mask


@pytest.mark.parametrize("kind", some(list(KINDS), DISTINCT))
def test_tokens_are_those_of_transformers(teacher, ids, kind):
    for lengths in ((18, 1), (40, 40)) if kind == "default" else ((18, 1),):
        model = converted(teacher, **KINDS[kind])  # a model keeps what was recorded for it
        tokens, mask = unequal(ids, lengths)
        expected = theirs(model, tokens, mask, **GREEDY)
        assert torch.equal(Engine(model).generate(sampling(model, **GREEDY), tokens, mask).tokens, expected)
        if kind in RECORDED:
            recorder = Recorder()
            written = Engine(model, recorder).generate(sampling(model, **GREEDY), tokens, mask)
            assert torch.equal(written.tokens, expected)
            assert recorder.replays == 2 * NEW - 1  # the prompt gave the first logits
            assert len(recorder.recordings) == 2 + bool(KINDS[kind].get("landmarks"))


@pytest.mark.parametrize(
    "kind", some(["default", "landmarks", "landmarks, few and shared", "landmarks, kda"], ["landmarks"])
)
def test_a_recorded_step_goes_on_for_ever_and_serves_every_text(teacher, ids, kind):
    """Recorded in an empty window, replayed past window, sinks and landmarks, for other texts, from states, greedy and
    sampled."""
    model, recorder = converted(teacher, **KINDS[kind]), Recorder()
    engine = Engine(model, recorder)
    for start, length in ((0, 1), (5, 3), (0, 19), (0, 36), (3, 90)):
        tokens = ids[:, start : start + length]
        expected = theirs(model, tokens, torch.ones_like(tokens), **GREEDY)
        written = engine.generate(sampling(model, **GREEDY), tokens, keep=True)
        assert torch.equal(written.tokens, expected)
        state = State.read(model, torch.cat([tokens, written.tokens], 1))
        assert written.state is not None and same(written.state, state)
        further = engine.generate(sampling(model, **GREEDY), tokens, state=written.state).tokens
        assert torch.equal(further, Engine(model).generate(sampling(model, **GREEDY), tokens, state=state).tokens)
        assert same(written.state, state)  # what was handed out is nobody's buffer
    steps = 1 + bool(KINDS[kind].get("landmarks"))  # without and with a merge
    assert len(recorder.recordings) == steps + 1
    engine.generate(sampling(model, **SAMPLED), ids[:, :9])
    assert len(recorder.recordings) == steps + 2  # the choice alone
    engine.generate(sampling(model, **GREEDY), ids[:1, :9])
    assert len(recorder.recordings) == 2 * steps + 3  # another batch size


def same(a: State, b: State) -> bool:
    pairs = [(x, y) for one, other in zip(a.layers, b.layers, strict=True) for x, y in zip_tensors(one, other)]
    close = all(torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5) for x, y in pairs)
    return close and torch.equal(a.last, b.last)


def zip_tensors(a, b) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for (_, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True)]


def test_nothing_but_the_buffers_carries_a_step(teacher, ids):
    """Between replays every other tensor that a step made is spoiled."""
    model, recorder = converted(teacher), Recorder()
    engine = Engine(model, recorder)
    expected = engine.generate(sampling(model, **GREEDY), ids[:, :30]).tokens
    buffers = {x.untyped_storage().data_ptr() for x in held_by(model)}
    spoiled = 0
    original = [recording.replay for recording in recorder.recordings]

    def spoiling(replay, recording):
        def run() -> None:
            nonlocal spoiled
            for _, _, _, results in recording.steps:
                for x in results:
                    if x.untyped_storage().data_ptr() not in buffers:
                        x.fill_(7)
                        spoiled += 1
            replay()

        return run

    for recording, replay in zip(recorder.recordings, original, strict=True):
        recording.replay = spoiling(replay, recording)  # type: ignore[method-assign]
    with torch.inference_mode():
        assert torch.equal(engine.generate(sampling(model, **GREEDY), ids[:, :30]).tokens, expected)
    assert spoiled > 1000


def held_by(model: LinearizedForCausalLM) -> list[Tensor]:
    from linearize.generation.engine import _ROWS

    rows = _ROWS[model]
    tensors = [x for layer in rows.state.layers for _, x in layer.tensors()]
    return [*tensors, rows.state.last, rows.alive, rows.logits, rows.told, *model.parameters(), *model.buffers()]


@pytest.mark.parametrize("recorded", [False, True])
def test_sampled_tokens_are_those_of_transformers_under_the_same_seed(teacher, ids, recorded):
    model = converted(teacher)
    tokens, mask = unequal(ids, (20, 5))
    for options in (SAMPLED, {**SAMPLED, "repetition_penalty": 1.4}, {**GREEDY, "do_sample": True}):
        torch.manual_seed(1)
        expected = theirs(model, tokens, mask, **options)
        engine = Engine(model, Recorder() if recorded else None)
        for _ in range(2):
            torch.manual_seed(1)
            assert torch.equal(engine.generate(sampling(model, **options), tokens, mask).tokens, expected)


@pytest.mark.parametrize("recorded", [False, True])
def test_rows_end_for_themselves(teacher, ids, recorded):
    model = converted(teacher)
    tokens, mask = unequal(ids, (40, 12, 3))
    free = theirs(model, tokens, mask, **GREEDY)
    ends = [int(free[0, 4]), int(free[1, 11])]
    options = {**GREEDY, "eos_token_id": ends, "repetition_penalty": 1.2}
    expected = theirs(model, tokens, mask, **options)
    heard: list[Tensor] = []
    engine = Engine(model, Recorder() if recorded else None)
    written = engine.generate(sampling(model, **options), tokens, mask, write=heard.append, keep=True)
    assert torch.equal(written.tokens, expected) and torch.equal(torch.stack(heard, 1), expected)
    assert written.state is not None
    for row in range(3):
        # The state of a row ends where the row did, whatever the others went on to write.
        new = expected[row]
        length = next((i + 1 for i, token in enumerate(new.tolist()) if token in ends), len(new))
        text = torch.cat([tokens[row][mask[row] > 0], new[:length]])[None]
        alone = State.read(model, text)
        assert int(written.state.tokens[row]) == text.shape[1]
        for layer, other in zip(written.state.layers, alone.layers, strict=True):
            for (name, x), (_, y) in zip(layer.tensors(), other.tensors(), strict=True):
                torch.testing.assert_close(x[row], y[0], rtol=1e-4, atol=1e-5, msg=name)


def test_pads_may_stand_on_the_right(teacher, ids):
    model = converted(teacher)
    left, mask = unequal(ids, (30, 9))
    expected = Engine(model).generate(sampling(model, **GREEDY), left, mask).tokens
    right, real = left.clone(), mask.flip(1)
    right[1] = right[1].roll(9)
    for recorder in (None, Recorder()):
        written = Engine(model, recorder).generate(sampling(model, **GREEDY), right, real)
        assert torch.equal(written.tokens, expected)


def test_what_is_not_followed_goes_to_transformers(teacher, ids):
    model = converted(teacher)
    for options in (
        {"num_beams": 2}, {"no_repeat_ngram_size": 3}, {"do_sample": True, "num_return_sequences": 2},
        {"bad_words_ids": [[5]]},
        {"logits_processor": []}, {"min_new_tokens": 3}, {"output_scores": True}, {"stop_strings": ["."]},
    ):  # fmt: skip
        assert Sampling.of(model.generation_config, {**GREEDY, **options}) is None
    assert Sampling.of(GenerationConfig(), {}) is None  # as long as transformers' default, prompt and all
    assert Sampling.of(GenerationConfig(typical_p=0.5, max_new_tokens=3), {"do_sample": True}) is None
    found = Sampling.of(GenerationConfig(eos_token_id=[2, 7], temperature=0.5, top_p=0.3), {"max_new_tokens": 9})
    assert found == Sampling(9, eos=(2, 7), pad=2)
    state = State.read(model, ids[:, :30])
    assert state.generate(model, **GREEDY, num_return_sequences=2, num_beams=2).shape == (4, NEW)
    assert torch.equal(state.generate(model, **GREEDY), state.generate(model, **GREEDY, logits_processor=[]))


def test_a_step_that_cannot_be_recorded_is_told_once_and_runs(teacher, ids, caplog):
    model = converted(teacher)

    def refuses(_) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = Engine(model, refuses)
    expected = Engine(model).generate(sampling(model, **GREEDY), ids[:, :30]).tokens
    for _ in range(2):
        assert torch.equal(engine.generate(sampling(model, **GREEDY), ids[:, :30]).tokens, expected)
    assert [r.getMessage() for r in caplog.records] == [
        "linearize: decoding is not recorded as a CUDA graph, which is slower: "
        "operation not permitted when stream is capturing"
    ]


def test_a_recording_refuses_what_asks_the_device(teacher, ids, monkeypatch):
    """The check of the checks: values asked for, and a step that the host counts, are found out."""
    tokens = torch.tensor([3, 4])
    for asks in (lambda: int(tokens.sum()), lambda: tokens[tokens > 3], lambda: bool((tokens == 3).all())):
        with pytest.raises(AskedError):
            Recorder()(asks)
    model = converted(teacher)
    expected = Engine(model).generate(sampling(model, **GREEDY), ids[:, :30]).tokens
    advance = LayerMemory.advance

    def counted_by_the_host(memory: LayerMemory, tokens: int, lengths: Tensor | None) -> None:
        advance(memory, tokens, lengths)
        if tokens == 1:
            memory.counts.fill_(memory._seen + 1)

    monkeypatch.setattr(LayerMemory, "advance", counted_by_the_host)
    written = Engine(model, Recorder()).generate(sampling(model, **GREEDY), ids[:, :30])
    assert not torch.equal(written.tokens, expected)


def test_weights_that_moved_are_recorded_again(teacher, ids):
    model, recorder = converted(teacher), Recorder()
    engine = Engine(model, recorder)
    engine.generate(sampling(model, **GREEDY), ids[:, :30])
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    expected = Engine(model).generate(sampling(model, **GREEDY), ids[:, :30]).tokens
    assert torch.equal(engine.generate(sampling(model, **GREEDY), ids[:, :30]).tokens, expected)
    assert len(recorder.recordings) == 4


def test_a_streamer_hears_every_token(teacher, ids):
    class Heard(TextStreamer):
        def __init__(self) -> None:
            self.values, self.ended = [], False

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended = True

    model, streamer = converted(teacher), Heard()
    state = State.read(model, ids[:1, :30])
    written = state.generate(model, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.values[1:]), written[0]) and streamer.ended
    assert torch.equal(streamer.values[0], state.last)
