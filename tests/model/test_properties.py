"""Whatever the masks, the pieces and the order of a batch: each row is the function of its own real tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.model.test_layer import KINDS, close, converted

SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
WIDTH = 60


@pytest.fixture(scope="module")
def models(teacher):
    return {kind: converted(teacher, **changes) for kind, changes in KINDS.items()}


def cuts_of(width: int) -> st.SearchStrategy[list[int]]:
    """Borders of the pieces that `width` columns are cut into."""
    return st.lists(st.integers(1, width - 1), max_size=8, unique=True).map(lambda inner: [0, *sorted(inner), width])


masks = st.lists(st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=3)


@torch.no_grad()
@SETTINGS
@given(kind=st.sampled_from(list(KINDS)), mask=masks, cuts=cuts_of(WIDTH))
@example(kind="default", mask=[[False] * WIDTH, [True] * WIDTH], cuts=[0, 30, WIDTH])
@example(kind="landmarks", mask=[[False] * 3 + [True] * 57, [True] * 54 + [False] * 6], cuts=[0, 50, 51, 56, WIDTH])
@example(kind="landmarks, few and shared", mask=[[True] * WIDTH, [False, True] * 30], cuts=[0, 1, 48, 49, 58, WIDTH])
@example(kind="softmax head", mask=[[False] * 31 + [True] * 29, [True] * WIDTH], cuts=[0, 30, 31, 32, WIDTH])
def test_any_mask_in_any_pieces(models, ids, kind, mask, cuts):
    """Real tokens may stand anywhere in a row, also with pads between them; a piece may have none at all."""
    model, real = models[kind], torch.tensor(mask)
    tokens = ids.flatten()[: real.numel()].reshape(real.shape).masked_fill(~real, 7)
    cache, logits = None, []
    for start, stop in itertools.pairwise(cuts):
        seen = real[:, :stop].long()
        result = model(tokens[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits.append(result.logits)
    whole = torch.cat(logits, 1)
    assert bool(torch.isfinite(whole).all())
    for row in range(len(mask)):
        if bool(real[row].any()):
            close(whole[row][real[row]], model(tokens[row][real[row]][None], use_cache=False).logits[0])
    assert cache.layers[0].counts.tolist() == real.sum(1).tolist()
    assert cache.get_seq_length() == WIDTH


@torch.no_grad()
@SETTINGS
@given(kind=st.sampled_from(list(KINDS)), borders=cuts_of(WIDTH), rows=st.integers(1, 3))
def test_any_packing(models, ids, kind, borders, rows):
    model, tokens = models[kind], ids.flatten()[: rows * WIDTH].reshape(rows, WIDTH)
    pieces = list(itertools.pairwise(borders))
    positions = torch.cat([torch.arange(stop - start) for start, stop in pieces]).expand(rows, -1)
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    for start, stop in pieces:
        close(packed[:, start:stop], model(tokens[:, start:stop], use_cache=False).logits)


@torch.no_grad()
@SETTINGS
@given(kind=st.sampled_from(list(KINDS)), data=st.data(), cut=st.integers(1, WIDTH - 1))
def test_any_order_of_a_batch(models, ids, kind, data, cut):
    """Rows keep their past when a cache is reordered, repeated or thinned out between two calls."""
    model, tokens = models[kind], ids.flatten()[: 3 * WIDTH].reshape(3, WIDTH)
    mask = torch.ones(3, cut, dtype=torch.long)
    mask[1, : data.draw(st.integers(0, cut - 1))] = 0  # rows of unequal length
    order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
    cache = model(tokens[:, :cut], attention_mask=mask, use_cache=True).past_key_values
    change = data.draw(st.sampled_from(["reorder", "select", "repeat"]))
    if change == "repeat":
        order = torch.arange(3).repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    elif change == "select":
        cache.batch_select_indices(order)
    else:
        cache.reorder_cache(order)
    after = torch.cat([mask[order], torch.ones(len(order), WIDTH - cut, dtype=torch.long)], 1)
    continued = model(tokens[order, cut:], attention_mask=after, past_key_values=cache).logits
    for row, source in enumerate(order.tolist()):
        alone = tokens[source][torch.cat([mask[source].bool(), torch.ones(WIDTH - cut, dtype=torch.bool)])]
        close(continued[row], model(alone[None], use_cache=False).logits[0, -(WIDTH - cut) :])
