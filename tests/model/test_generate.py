"""Every way of transformers to call a model that a converted one takes, and those that it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from linearize.model import LinearizedForCausalLM
from linearize.model.attention import CACHE_NAMES, LinearizedAttention
from linearize.model.memory import LayerMemory
from tests.model.test_layer import DISTINCT, KINDS, TOKENS, close, converted, in_pieces
from tests.tables import some


@torch.no_grad()
def test_generate_greedy_padded_chunked_and_sampled(teacher, ids):
    model = converted(teacher)
    rows = [ids[0, :40], ids[1, :23]]
    alone = [
        model.generate(
            r[None], attention_mask=torch.ones(1, len(r)), max_new_tokens=30, do_sample=False, pad_token_id=0
        )
        for r in rows
    ]
    tokens, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
    for row, prompt in enumerate(rows):
        tokens[row, 40 - len(prompt) :], mask[row, 40 - len(prompt) :] = prompt, 1
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    for row in range(2):
        new = alone[row][0, len(rows[row]) :]
        assert torch.equal(together[row, 40 : 40 + len(new)], new)
        whole = model(alone[row]).logits.argmax(-1)[0, len(rows[row]) - 1 : -1]
        assert torch.equal(whole, new)
    chunked = model.generate(
        tokens, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, prefill_chunk_size=7
    )
    assert torch.equal(chunked, together)
    torch.manual_seed(0)
    sampled = model.generate(
        tokens, attention_mask=mask, max_new_tokens=10, do_sample=True, num_return_sequences=2, pad_token_id=0
    )
    assert sampled.shape[0] == 4
    beams = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, num_beams=3, pad_token_id=0)
    uncached = model.generate(
        tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, num_beams=3, pad_token_id=0, use_cache=False
    )
    assert torch.equal(beams, uncached)


@torch.no_grad()
def test_assisted_decoding_is_refused(teacher, ids):
    with pytest.raises(ValueError, match="stateful"):
        converted(teacher).generate(ids[:1], assistant_model=teacher, max_new_tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_early_exit"])
def test_other_ways_to_draft_tokens_are_refused(teacher, ids, option):
    with pytest.raises(ValueError):
        converted(teacher).generate(ids[:1], max_new_tokens=4, pad_token_id=0, **{option: 1})


@torch.no_grad()
def test_contrastive_search_and_continuous_batching_are_refused(teacher, ids):
    model = converted(teacher)
    with pytest.raises(ValueError):
        model.generate(ids[:1], max_new_tokens=4, pad_token_id=0, penalty_alpha=0.6, top_k=4)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match="continuous batching is not supported"):
            call([[5, 6, 7]])


def left_padded(ids):
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :17] = 0
    return ids[:, :50].masked_fill(mask == 0, 3), mask


@torch.no_grad()
@pytest.mark.parametrize("kind", some(list(KINDS), DISTINCT))
def test_a_static_cache_is_the_dynamic_one(teacher, ids, kind):
    model = converted(teacher, **KINDS[kind])
    tokens, mask = left_padded(ids)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)
    beams = model.generate(tokens, num_beams=2, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", num_beams=2, **options), beams)


@torch.no_grad()
@pytest.mark.parametrize("kind", some(["default", "liger", "softmax head", "softmax layer"], ["default"]))
def test_decoding_compiles_to_one_graph(teacher, ids, kind):
    from torch._dynamo.utils import counters

    model = converted(teacher, **KINDS[kind])
    tokens, mask = left_padded(ids)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    torch._dynamo.reset()
    counters.clear()
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    compiled = model.generate(tokens, cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(compiled, expected)
    assert counters["stats"]["unique_graphs"] == 1  # nothing was compiled again while tokens came
    assert not counters["graph_break"]


@pytest.mark.check
@torch.no_grad()
def test_landmarks_stay_out_of_compiled_graphs(teacher, ids):
    model = converted(teacher, **KINDS["landmarks"])
    tokens, mask = left_padded(ids)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    assert torch.equal(
        model.generate(tokens, cache_implementation="static", compile_config=compiling, **options), expected
    )


@torch.no_grad()
def test_penalties_and_several_sequences_equal_generation_without_a_cache(teacher, ids):
    model = converted(teacher)
    tokens, mask = left_padded(ids)
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "num_beams": 4,
        "num_return_sequences": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "length_penalty": 0.5,
    }  # fmt: skip
    cached = model.generate(tokens, **options)
    assert cached.shape[0] == 6
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))


@torch.no_grad()
def test_hidden_states_are_there_and_attention_weights_are_refused(teacher, ids):
    model = converted(teacher, window=TOKENS)
    ours = model(ids, output_hidden_states=True).hidden_states
    theirs = teacher(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == teacher.config.num_hidden_layers + 1
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    with pytest.raises(ValueError, match="no attention weights"):
        model(ids, output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("where", ["auto", "disk"])
def test_device_maps(teacher, ids, tmp_path, where):
    model = converted(teacher)
    model.save_pretrained(tmp_path / "model")
    device_map = (
        where
        if where == "auto"
        else dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    )
    again = LinearizedForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(again(ids).logits, model(ids).logits)
    close(in_pieces(again, ids, [50, 1, TOKENS - 51]), model(ids).logits)


def test_adapters_load_on_top(teacher, ids, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    for targets in (["q_proj", "v_proj"], ["k_proj"]):
        base = converted(teacher)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            expected = adapted(ids).logits
            assert not torch.allclose(expected, converted(teacher)(ids).logits)
            adapted.save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(converted(teacher), tmp_path)
            assert torch.equal(loaded(ids).logits, expected)
            native = converted(teacher)
            native.load_adapter(str(tmp_path))
            close(native(ids).logits, expected)
            close(in_pieces(loaded, ids, [40, 1, 1, TOKENS - 42]), expected)
            close(loaded.merge_and_unload()(ids).logits, expected)


@torch.no_grad()
def test_inputs_as_embeddings(teacher, ids):
    model = converted(teacher)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


@torch.no_grad()
def test_the_cache_has_each_of_its_names(teacher, ids):
    """transformers 5.24 calls `cache` what was `past_key_values`, and its models hand it to their layers as such."""
    model = converted(teacher)
    whole = model(ids, use_cache=False).logits
    for name in ("cache", "past_key_values"):
        held = DynamicCache()
        model(ids[:, :50], use_cache=True, **{name: held})
        close(model(ids[:, 50:], use_cache=True, **{name: held}).logits, whole[:, 50:])
        assert all(isinstance(layer, LayerMemory) for layer in held.layers)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_layer_takes_the_cache_by_each_of_its_names(teacher, ids, name):
    model, held = converted(teacher), DynamicCache()
    layer, hidden = model.attention_layers[0], model.get_input_embeddings()(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    whole = layer(hidden, position_embeddings=rotary)[0]
    layer(hidden[:, :-1], position_embeddings=tuple(x[:, :-1] for x in rotary), **{name: held})
    last = layer(hidden[:, -1:], position_embeddings=tuple(x[:, -1:] for x in rotary), **{name: held})[0]
    close(last, whole[:, -1:])


@torch.no_grad()
def test_a_name_of_the_cache_that_layers_do_not_know_is_an_error(teacher, ids, monkeypatch):
    model, forward = converted(teacher), LinearizedAttention.forward

    def renamed(self, *arguments, **keywords):
        return forward(self, *arguments, **{("held" if key in CACHE_NAMES else key): x for key, x in keywords.items()})

    monkeypatch.setattr(LinearizedAttention, "forward", renamed)
    model(ids, use_cache=False)
    with pytest.raises(RuntimeError, match=r"transformers [\d.]+ hands its cache to layers under a name"):
        model(ids, use_cache=True)
