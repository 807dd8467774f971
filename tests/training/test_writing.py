"""A teacher that writes on a growing cache writes what it writes on transformers' own, to the bit, in every family."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from linearize.data import writing
from linearize.data.writing import grouped_attention, growing_cache

from ..model.test_families import build, convert, every_row


def written(model, cache) -> torch.Tensor:
    """Logits of a batch with pads, then of some of its rows, which go on."""
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.randint(2, 97, (4, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    torch.manual_seed(3)
    for new, kept in ((14, torch.tensor([0, 2, 3])), (6, torch.tensor([1]))):
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, **options
        )
        found.append(torch.stack(out.logits).flatten())
        cache.batch_select_indices(kept)
        ids, mask = out.sequences[kept], torch.nn.functional.pad(mask[kept], (0, new), value=1)
    return torch.cat(found)


@every_row
def test_the_same_logits(row, monkeypatch):
    monkeypatch.setattr(writing, "_BLOCK", 8)
    model = build(row)
    own = model.config._attn_implementation
    expected = written(model, DynamicCache(config=model.config))
    with grouped_attention(model):
        found = written(model, growing_cache(model))
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == own


def test_a_converted_model_writes_as_ever():
    model = convert("gemma3_text")
    expected = written(model, DynamicCache(config=model.config.get_text_config()))
    with grouped_attention(model):
        assert torch.equal(written(model, growing_cache(model)), expected)


def test_nothing_is_copied_but_where_room_ends(monkeypatch):
    monkeypatch.setattr(writing, "_BLOCK", 8)
    layer = writing._GrowingLayer()
    rows = torch.randn(2, 3, 20, 4)
    places = set()
    for place in range(20):
        keys, values = layer.update(rows[:, :, place : place + 1], -rows[:, :, place : place + 1])
        assert torch.equal(keys, rows[:, :, : place + 1]) and torch.equal(values, -keys)
        places.add(keys.data_ptr())
    assert len(places) == 4  # the first token's own, and three blocks
