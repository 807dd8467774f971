"""What a decoding step on a CPU does to keep launches few: tensors that lie side by side instead of being joined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from linearize import State
from linearize.families.base import project_jointly
from linearize.generation.engine import _ROWS, Engine
from linearize.generation.sampling import Sampling
from linearize.model import LinearizedForCausalLM, MixerConfig
from tests.model.recorded import Recorder
from tests.model.test_layer import close, converted


def read(model, cache, ids):
    return model(ids, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def test_a_memory_is_one_whether_its_parts_lie_side_by_side_or_not(teacher, ids):
    """Reordered, copied and reset after steps that joined its sinks and window, and in and out of inference mode."""
    model = converted(teacher, window=8, sinks=2)
    whole = model(ids[:, :24]).logits
    cache = DynamicCache(config=model.config.text_config)
    close(read(model, cache, ids[:, :16]), whole[:, :16])
    with torch.inference_mode():
        for t in range(16, 19):
            close(read(model, cache, ids[:, t : t + 1]), whole[:, t : t + 1])
    memory = cache.layers[0]
    sinks, window = memory.parts["sinks"]["v"], memory.parts["window"]["v"]
    assert sinks.untyped_storage().data_ptr() == window.untyped_storage().data_ptr()
    assert memory.nbytes == sum(x.numel() * x.element_size() for _, x in memory.tensors())
    close(read(model, cache, ids[:, 19:20]), whole[:, 19:20])
    copied = memory.clone()
    assert copied.counts.tolist() == [20, 20]
    swapped = torch.tensor([1, 0])
    for layer in cache.layers:
        layer.reorder_cache(swapped)
    for t in range(20, 22):
        close(read(model, cache, ids[swapped, t : t + 1]), whole[swapped, t : t + 1])
    close(read(model, cache, ids[swapped, 22:24]), whole[swapped, 22:24])
    for layer in cache.layers:
        layer.reset()
    close(read(model, cache, ids[:, :16]), whole[:, :16])
    close(read(model, cache, ids[:, 16:17]), whole[:, 16:17])


@torch.no_grad()
def test_windows_side_by_side_with_sinks_and_landmarks_go_together(teacher, ids):
    mixers = [
        MixerConfig(layers=[0], window=8, sinks=2, landmarks=12),
        MixerConfig(layers=[1], window=8, sinks=2),
    ]
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), mixers).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mix_weight"):
            parameter.fill_(0.3)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config.text_config)
    pieces = [read(model, cache, ids[:, :20]), *(read(model, cache, ids[:, t : t + 1]) for t in range(20, 110))]
    close(torch.cat(pieces, 1), whole[:, :110])
    assert int(cache.layers[0].parts["landmarks"]["number"].max()) > 32  # of the second block
    sinks, window = (cache.layers[1].parts[part]["v"] for part in ("sinks", "window"))
    assert sinks.untyped_storage().data_ptr() == window.untyped_storage().data_ptr()
    close(read(model, cache, ids[:, 110:]), whole[:, 110:])


@torch.no_grad()
def test_what_was_recorded_finds_its_tensors_where_they_were(teacher, ids):
    """Single tokens are read call by call between recorded steps; neither they nor counting moves anything."""
    model, recorder = converted(teacher, window=8, sinks=2), Recorder()
    sampling = Sampling(12, eos=(), pad=0)
    engine = Engine(model, recorder)
    state = State.read(model, ids[:, :30])
    engine.generate(sampling, state=state, owned=True)
    held = [x.data_ptr() for layer in _ROWS[model].state.layers for _, x in layer.tensors()]
    for tokens in (ids[:, 30:31], ids[:, 40:41], ids[:, 50:60]):
        state = State.read(model, ids[:, :30])
        expected = Engine(model).generate(sampling, tokens, state=state).tokens
        assert torch.equal(engine.generate(sampling, tokens, state=state).tokens, expected)
    assert held == [x.data_ptr() for layer in _ROWS[model].state.layers for _, x in layer.tensors()]
    assert len(recorder.recordings) == 2


@torch.no_grad()
def test_a_state_that_may_be_changed_is_continued_as_its_copy_is(teacher, ids):
    """Two rows with pads in different calls have a cache of kept softmax that is wider than each of them."""
    mixers = [MixerConfig(layers=[0], window=8, softmax_heads=[0]), MixerConfig(layers=[1], window=8)]
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), mixers).eval()
    first, second = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    first[1, 4:] = second[0, 4:] = 0
    state = State.read(model, ids[:, 8:16], second, State.read(model, ids[:, :8], first))
    expected = Engine(model).generate(Sampling(12, eos=(), pad=0), state=state.fork()).tokens
    assert torch.equal(Engine(model).generate(Sampling(12, eos=(), pad=0), state=state, owned=True).tokens, expected)


@torch.no_grad()
def test_a_memory_of_inference_mode_is_counted_and_copied_outside(teacher, ids):
    model = converted(teacher, window=8, sinks=2)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config.text_config)
        read(model, cache, ids[:, :5])
        read(model, cache, ids[:, 5:6])
    assert cache.layers[0].counts.tolist() == cache.layers[0].clone().counts.tolist() == [6, 6]


@torch.no_grad()
def test_linear_layers_of_one_input_are_one_product_and_held_once():
    torch.manual_seed(0)
    layers = [nn.Linear(8, width, bias=False) for width in (6, 3, 3)]
    x = torch.randn(2, 1, 8)
    want = [layer(x) for layer in layers]
    parameters = [layer.weight for layer in layers]
    for _ in range(2):
        for got, expected in zip(project_jointly(x, layers), want, strict=True):
            torch.testing.assert_close(got, expected)
    assert all(layer.weight is parameter for layer, parameter in zip(layers, parameters, strict=True))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    layers[1].weight.mul_(2)  # whoever changes a weight changes what is multiplied
    torch.testing.assert_close(project_jointly(x, layers)[1], 2 * want[1])
    layers[1].weight.data = layers[1].weight.detach().clone() * 2
    torch.testing.assert_close(project_jointly(x, layers)[1], 4 * want[1])
    copies = copy.deepcopy(layers)
    copies[0].weight.zero_()
    torch.testing.assert_close(project_jointly(x, layers)[0], want[0])


@torch.no_grad()
def test_weights_that_lie_side_by_side_are_written_and_trained_as_before(tmp_path, teacher, ids):
    model = converted(teacher, window=8, sinks=2)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config.text_config)
        read(model, cache, ids[:, :12])
        read(model, cache, ids[:, 12:13])
    model.save_pretrained(tmp_path)
    close(LinearizedForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("change", ["bias", "hook", "adapter"])
@torch.no_grad()
def test_modules_that_are_more_than_a_weight_are_called(change):
    layers: list[nn.Module] = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    if change == "bias":
        layers[1] = nn.Linear(4, 4)
    elif change == "hook":
        layers[1].register_forward_hook(lambda _, __, output: output + 1)
    else:
        layers[1] = nn.Sequential(layers[1], nn.Linear(4, 4))
    x = torch.randn(1, 1, 4)
    for got, layer in zip(project_jointly(x, layers), layers, strict=True):
        torch.testing.assert_close(got, layer(x))
