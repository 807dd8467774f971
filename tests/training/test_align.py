"""The objective `align` against its definition, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.conversion.swap import convert_model
from linearize.errors import RecipeError
from linearize.families.base import AttentionLayer, Projections
from linearize.model import MixerConfig
from linearize.model.mixer.mixer import Mixer
from linearize.recipe import LoraSpec, MixerSpec
from linearize.training.adapters import add_adapters, choose_trained
from linearize.training.align import Alignment, read_beyond
from tests.model import test_families as families

WINDOW, SINKS = 6, 2
LENGTHS = ((25, 15), (7, 33))  # of the documents packed into each row
POSITIONS = torch.tensor([[*range(a), *range(b)] for a, b in LENGTHS])


@pytest.fixture(scope="module")
def teacher(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval().requires_grad_(False)


@pytest.fixture
def ids(teacher):
    torch.manual_seed(1)
    return torch.randint(5, teacher.config.vocab_size, (2, 40))


def student_of(teacher, lora=None, **mixer):
    spec = MixerSpec(window=WINDOW, sinks=SINKS, **mixer)
    student = add_adapters(convert_model(copy.deepcopy(teacher), spec), lora)
    choose_trained(student, "lora")
    return student


def attention_calls(teacher, ids):
    """Hidden states and rotary tables of each layer, by hand."""
    calls = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, a, k: calls.append(k), with_kwargs=True)
        for layer in teacher.model.layers
    ]
    teacher(ids, position_ids=POSITIONS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def beyond_by_hand(teacher, layer, call, row, query, document):
    """What query head 0 to H - 1 read beyond window and sinks, by one softmax for each."""
    attention, config = teacher.model.layers[layer].self_attn, teacher.config
    width = attention.head_dim
    hidden = call["hidden_states"][row]
    cos, sin = (x[row if len(x) > 1 else 0] for x in call["position_embeddings"])

    def turned(x, at):
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos[at] + half * sin[at]

    keys = range(document + SINKS, query - WINDOW + 1)
    heads = []
    for head in range(config.num_attention_heads):
        shared = head * config.num_key_value_heads // config.num_attention_heads
        q = turned(attention.q_proj(hidden[query])[head * width : (head + 1) * width], query)
        of = slice(shared * width, (shared + 1) * width)
        scores = torch.stack([turned(attention.k_proj(hidden[s])[of], s) @ q * width**-0.5 for s in keys])
        values = torch.stack([attention.v_proj(hidden[s])[of] for s in keys])
        heads.append(scores.softmax(0) @ values)
    return torch.cat(heads)


def test_the_recurrence_is_held_to_what_the_window_does_not_see(teacher, ids):
    student = student_of(teacher)
    found = Alignment(student, teacher, 40).losses(ids, POSITIONS, beyond=True)
    expected = torch.zeros(2)
    for layer, call in enumerate(attention_calls(teacher, ids)):
        mixer = student.attention_layers[layer].mixer
        for row, lengths in enumerate(LENGTHS):
            error = size = 0.0
            for document, length in zip((0, lengths[0]), lengths, strict=True):
                part = slice(document, document + length)
                tables = tuple(x[-1:, part] if len(x) == 1 else x[row, part][None] for x in call["position_embeddings"])
                new = student.attention_layers[layer].project(call["hidden_states"][row : row + 1, part], tables)
                mixer.branches_off = frozenset({"window"})
                answers = mixer(new, None, None)[0].flatten(1)
                mixer.branches_off = frozenset()
                for t in range(WINDOW + SINKS, length):
                    target = beyond_by_hand(teacher, layer, call, row, document + t, document)
                    error += (answers[t] - target).square().sum().item()
                    size += target.square().sum().item()
            expected[row] += error / size / len(student.attention_layers)
    torch.testing.assert_close(found.detach().float(), expected, rtol=1e-5, atol=0)
    assert bool(((found > 0.01) & (found < 2)).all())


def test_a_window_over_everything_is_aligned_as_it_is(teacher, ids):
    student = add_adapters(convert_model(copy.deepcopy(teacher), MixerSpec(window=40)), None)
    assert float(Alignment(student, teacher, 80).losses(ids, POSITIONS, beyond=False).mean()) < 1e-12
    short = student_of(teacher)
    assert Alignment(short, teacher, 40).losses(ids, POSITIONS, beyond=False).mean().item() > 1e-4


def test_layers_with_landmarks_are_aligned_as_a_whole(teacher, ids):
    alignment = Alignment(student_of(teacher, landmarks=8, mix="softmax"), teacher, 40)
    losses = [alignment.losses(ids, POSITIONS, beyond=beyond).mean() for beyond in (True, False)]
    assert not alignment.recurrent and torch.equal(*losses) and float(losses[0].detach()) > 0


@pytest.mark.parametrize("beyond", [True, False])
def test_no_layer_learns_from_another_and_checkpointing_keeps_every_gradient(teacher, ids, beyond):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = student_of(teacher, LoraSpec())
        base = student.get_base_model()
        alignment = Alignment(base, teacher, 40, checkpointing=checkpointing)
        alignment.losses(ids, POSITIONS, beyond=beyond).mean().backward()
        named = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        gradients.append(named)
        assert any(bool(g.any()) for n, g in named.items() if "lora_B" in n)
        # Under `beyond` the recurrence's share has no say; afterwards it is what lets the recurrence in.
        shares = [n for n in named if n.endswith("mix_weight")]
        assert len(shares) == (0 if beyond else len(base.attention_layers))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # Another first layer changes nothing in the second: its inputs are the teacher's.
    last = [n for n in gradients[0] if ".layers.1." in n]
    torch.manual_seed(0)
    other = student_of(teacher, LoraSpec())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".layers.0." in name and "lora_B" in name:
                parameter.normal_()
    Alignment(other.get_base_model(), teacher, 40).losses(ids, POSITIONS, beyond=beyond).mean().backward()
    found = {n: p.grad for n, p in other.named_parameters()}
    assert last and all(torch.equal(found[name], gradients[0][name]) for name in last)


def test_with_all_tokens_in_the_state_the_target_is_the_whole_attention(teacher, ids):
    student = student_of(teacher, covers="all", mix="fixed")
    alignment = Alignment(student, teacher, 40)
    found = alignment.losses(ids, POSITIONS, beyond=True).mean()
    first = student.attention_layers[0].mixer
    assert 0.01 < float(found) < 2 and first.branches_off == frozenset()
    found.backward()
    assert bool(first.recurrence.gate_bias.grad.any())


def test_kept_layers_take_no_part_and_short_rows_are_refused(teacher, ids):
    kept = convert_model(copy.deepcopy(teacher), MixerSpec(window=WINDOW, keep={"layers": [0]}))
    assert len(Alignment(kept, teacher, 40).pairs) == len(kept.attention_layers) - 1
    with pytest.raises(RecipeError, match="nothing beyond window and sinks") as refused:
        Alignment(student_of(teacher), teacher, WINDOW + SINKS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("beyond", [True, False])
def test_a_rows_loss_and_gradients_are_its_own_however_rows_are_split(teacher, beyond):
    """With a row whose documents are no longer than window and sinks, alone and beside others."""
    torch.manual_seed(1)
    ids = torch.randint(5, teacher.config.vocab_size, (4, 40))
    short = torch.arange(WINDOW + SINKS).repeat(5)
    positions = torch.stack([*POSITIONS, short, torch.arange(40)])
    found = []
    for size in (4, 3, 2, 1):
        torch.manual_seed(0)
        student = student_of(teacher, LoraSpec())
        alignment = Alignment(student.get_base_model(), teacher, 40)
        parts = zip(ids.split(size), positions.split(size), strict=True)
        losses = torch.cat([alignment.losses(*part, beyond=beyond) for part in parts])
        losses.mean().backward()
        found.append((losses.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    (losses, gradients), *others = found
    assert (float(losses[2]) == 0) == beyond and bool((losses[[0, 1, 3]] > 0.01).all())
    for other, also in others:
        torch.testing.assert_close(other, losses, rtol=1e-6, atol=1e-12)
        assert also.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert float((also[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


@pytest.mark.parametrize("covers", ["evicted", "all"])
@pytest.mark.parametrize(("own", "softcap"), [(None, None), (13, None), (None, 2.0), (13, 2.0)])
def test_what_a_layer_of_any_kind_reads_beyond(own, softcap, covers):
    torch.manual_seed(0)
    tokens, width = 30, 8
    layer = AttentionLayer(4, 2, width, width, scale=0.4, softcap=softcap, window=own)
    mixer = Mixer(MixerConfig(layers=[0], window=WINDOW, sinks=SINKS, covers=covers, mix="fixed"), layer)
    q = torch.randn(2, tokens, 4, width, dtype=torch.float64)
    k, v = (torch.randn(2, tokens, 2, width, dtype=torch.float64) for _ in range(2))
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (key <= query) & (key > query - (own or tokens))
    if covers == "evicted":
        seen &= (key >= SINKS) & (key <= query - WINDOW)
    scores = torch.einsum("rthd,rshd->rhts", q, k.repeat_interleave(2, 2)) * layer.scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("rhts,rshd->rthd", weights, v.repeat_interleave(2, 2))
    first = WINDOW + SINKS if covers == "evicted" else 0
    found = read_beyond(Projections(q, k, v, q, k), layer, mixer)
    # Scores under a cap, and those of a window, are float32.
    torch.testing.assert_close(found.double(), expected[:, first:], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "row",
    ["llama, biases", "mistral, sliding", "qwen3", "gemma2", "phi3", "smollm3", "granite", "cohere", "stablelm",
     "falcon, grouped", "gpt_neox", "gpt2", "olmo2", "starcoder2", "glm"],
)  # fmt: skip
def test_every_family_is_aligned_as_it_calls_its_attention(row):
    family = families.build(row)
    text = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    # Where a layer has a window of its own, ours cannot be wider.
    everything = convert_model(copy.deepcopy(family), MixerSpec(window=39, sinks=0))
    assert Alignment(everything, family, 80).losses(text, POSITIONS, beyond=False).mean().item() < 1e-9
    student = convert_model(copy.deepcopy(family), MixerSpec(window=WINDOW, sinks=SINKS))
    choose_trained(student, "mixer")
    for beyond in (True, False):
        loss = Alignment(student, family, 40).losses(text, POSITIONS, beyond=beyond).mean()
        loss.backward()
        assert 1e-5 < loss.item() < 3
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters() if p.requires_grad)
