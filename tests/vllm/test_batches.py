"""A server's steps over pages are the mixer's one function: chunks, batches, reused pages, arrivals and departures."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from torch import nn

from linearize.families.base import AttentionLayer, Projections
from linearize.model import MixerConfig
from linearize.model.mixer.mixer import Mixer
from linearize.vllm.batches import batches, mix
from linearize.vllm.pages import Pages
from linearize.vllm.weights import of_rank
from tests.model.test_layer import DISTINCT, KINDS
from tests.tables import some

LAYER = AttentionLayer(query_heads=4, key_value_heads=2, key_width=8, value_width=8, scale=8**-0.5)
LEARNED = "landmarks, a learned score"
WHOLE = {kind for kind, options in KINDS.items() if "softmax_heads" not in options and kind != "softmax layer"}


def mixer_of(kind: str) -> Mixer:
    torch.manual_seed(0)
    mixer = Mixer(MixerConfig(**{"layers": [0], "window": 16, **KINDS[kind]}), LAYER, 0.5)
    if "mix_weight" in mixer._parameters:
        mixer.mix_weight.data = 0.3 + 0.2 * torch.randn(mixer.mix_weight.shape)
    return mixer


def drawn(tokens: int) -> Projections:
    heads = (LAYER.query_heads, LAYER.key_value_heads, LAYER.key_value_heads, LAYER.query_heads, LAYER.key_value_heads)
    return Projections(*(torch.randn(1, tokens, count, LAYER.key_width) for count in heads))


@torch.inference_mode()
@pytest.mark.parametrize("kind", some(sorted(WHOLE), [kind for kind in DISTINCT if kind in WHOLE]))
def test_any_schedule_is_the_whole_text(kind: str) -> None:
    mixer, chance = mixer_of(kind), random.Random(kind)  # noqa: S311
    held = Pages({0: mixer.parts(1, torch.float32, torch.device("meta"))})
    pages = torch.full((6, held.nbytes + 64), 77, dtype=torch.int8)  # as an earlier sequence may have left them
    untouched = pages.clone()
    held.bind(0, pages)
    texts = [drawn(n) for n in (1, 2, 40, 40, 90, 97, 110, 150, 33)]
    wanted = [mixer(text, None, None) for text in texts]
    given = [torch.full_like(x, torch.nan) for x in wanted]
    waiting, running, free = list(range(len(texts))), dict[int, int](), [5, 1, 2, 4]  # text -> page; 0 and 3 never
    seen = [0] * len(texts)
    while waiting or running:
        while waiting and free and chance.random() < 0.7:
            running[waiting.pop(0)] = free.pop(0)
        step = [(i, min(chance.choice([1, 1, 1, 7, 32, 200]), wanted[i].shape[1] - seen[i])) for i in running]
        if not step:
            continue
        lengths, before = [n for _, n in step], [seen[i] for i, _ in step]
        new = Projections(
            *(torch.cat([texts[i][part][0, seen[i] : seen[i] + n] for i, n in step]) for part in range(len(texts[0])))
        )
        places = [running[i] for i, _ in step]
        if fresh := [place for place, past in zip(places, before, strict=True) if not past]:
            held.clear([0], torch.tensor(fresh))
        out = torch.full((len(new.q), LAYER.query_heads, LAYER.value_width), torch.nan)
        for batch in batches(lengths, before, places, out.device, most=chance.choice([1, 2, 9])):
            mix(mixer, new, batch, held.memory(0), out)
        for (i, n), mixed in zip(step, out.split(lengths), strict=True):
            given[i][0, seen[i] : seen[i] + n] = mixed
            seen[i] += n
            if seen[i] == wanted[i].shape[1]:
                free.append(running.pop(i))
    for ours, whole in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))
    assert pages[[0, 3]].equal(untouched[[0, 3]])


@torch.inference_mode()
@pytest.mark.parametrize("kind", sorted(WHOLE - {"retention", LEARNED}))
def test_a_tensor_parallel_rank_computes_its_heads_alone(kind: str) -> None:
    """vLLM refuses retention, because a head's decay depends on its number."""
    whole, text = mixer_of(kind), drawn(90)
    wanted = whole(text, None, None)
    for rank in range(2):
        part = Mixer(whole.config, replace(LAYER, query_heads=2, key_value_heads=1), 0.5)
        part.load_state_dict({name: weight.chunk(2)[rank] for name, weight in whole.state_dict().items()})
        heads = part(Projections(*(x.chunk(2, 2)[rank] for x in text)), None, None)
        torch.testing.assert_close(heads, wanted.chunk(2, 2)[rank], rtol=0, atol=2e-5 * float(wanted.abs().max()))


@torch.inference_mode()
def test_ranks_sum_their_terms_of_a_learned_score() -> None:
    whole, text = mixer_of(LEARNED), drawn(90)
    whole.score_weight.data = torch.randn(whole.score_weight.shape)
    wanted, terms, both = whole(text, None, None), dict[int, torch.Tensor](), Barrier(2)

    def heads_of(rank: int) -> torch.Tensor:
        part = Mixer(whole.config, replace(LAYER, query_heads=2, key_value_heads=1), 0.5)
        part.score_weight = nn.Parameter(of_rank(part, "score_weight", whole.score_weight, rank))

        def sum_of_ranks(scores: torch.Tensor) -> torch.Tensor:
            terms[rank] = scores
            both.wait(60)
            return (terms[0] + terms[1])[..., rank : rank + 1]

        part.sum_of_ranks = sum_of_ranks
        with torch.inference_mode():  # of this thread
            return part(Projections(*(x.chunk(2, 2)[rank] for x in text)), None, None)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(heads_of, range(2))), 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_prompts_of_similar_lengths_run_together_and_tokens_that_decode_in_one_batch() -> None:
    lengths, seen = [1, 30, 1, 32, 500, 1, 31], [9, 0, 30, 0, 0, 9, 64]
    found = batches(lengths, seen, [3, 4, 1, 2, 6, 5, 7], torch.device("cpu"))
    assert [(b.length, len(b.counts), b.lengths is None, b.uniform) for b in found] == [
        (1, 3, True, None), (32, 2, False, 0), (500, 1, True, 0), (31, 1, True, 64),
    ]  # fmt: skip
    found = batches(lengths, seen, [3, 4, 1, 2, 6, 5, 7], torch.device("cpu"), most=2)
    assert [(b.length, len(b.counts)) for b in found] == [(1, 2), (1, 1), (32, 2), (500, 1), (31, 1)]


def test_a_page_has_a_place_for_every_tensor_in_its_own_dtype() -> None:
    parts = {
        "window": {"v": torch.zeros(1, 3, 2, 5, dtype=torch.bfloat16), "novelty": torch.zeros(1, 3, 2)},
        "slots": {"number": torch.zeros(1, 7, dtype=torch.int32), "scale": torch.zeros(1, 1, dtype=torch.float64)},
        "bytes": {"k": torch.zeros(1, 9, dtype=torch.int8), "full": torch.zeros(1, dtype=torch.bool)},
    }
    held = Pages({7: parts})
    pages = torch.zeros(4, held.nbytes, dtype=torch.int8)
    held.bind(7, pages)
    views = held.memory(7)
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            view = views[part][name]
            assert view.dtype == tensor.dtype and view.shape == (4, *tensor.shape[1:])
            view[2] = 1
    assert not pages[[0, 1, 3]].any()
    nbytes = sum(x.nbytes for tensors in parts.values() for x in tensors.values())
    assert int((pages[2] != 0).sum()) <= nbytes <= held.nbytes


@pytest.mark.parametrize("shared", [True, False])
def test_layers_of_unequal_memory_have_pages_of_one_size(shared: bool) -> None:
    def parts(slots: int) -> dict:
        return {
            "slots": {name: torch.zeros(1, slots, 3, 4, dtype=torch.int8) for name in ("k", "v")},
            "window": {"k": torch.zeros(1, 16, 3, 4)},
        }

    memories = {layer: parts(slots) for layer, slots in enumerate((400, 60, 100, 240))}
    held = Pages(memories, shared=shared)
    total = sum(x.nbytes for parts in memories.values() for tensors in parts.values() for x in tensors.values())
    largest = 2 * 400 * 12 + 16 * 12 * 4
    assert total <= len(memories) * held.nbytes < 1.2 * total if shared else held.nbytes == largest
    pages = {layer: torch.full((3, held.nbytes), 1, dtype=torch.int8) for layer in memories}
    for layer in memories:
        held.bind(layer, pages[layer])
    held.clear(list(memories), torch.tensor([1]))
    for layer in memories:
        for tensors in held.memory(layer).values():
            for view in tensors.values():
                assert not view[1].any()
                view[1] = 1
    assert sum(int((page[1] != 0).sum()) for page in pages.values()) <= total
    assert all(page[[0, 2]].eq(1).all() for page in pages.values())
