"""Window dropout: what a hidden window is, and that the draw holds until the backward pass is over."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.conversion.swap import convert_model
from linearize.data.rows import Document, pack
from linearize.errors import DataError
from linearize.recipe import MixerSpec, Stage
from linearize.training.windows import WindowDropout, check_something_to_learn, nothing_to_recall


@pytest.mark.parametrize("covers", ["evicted", "all"])
def test_a_hidden_window_is_a_window_of_one_token(tiny_folder, covers):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model, narrow = (
        convert_model(copy.deepcopy(teacher), MixerSpec(window=w, covers=covers, mix="softmax")) for w in (12, 1)
    )
    ids = torch.randint(5, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    given, hidden = model(ids).logits, narrow(ids).logits
    assert float((given - hidden).detach().abs().max()) > 0.1
    windows = WindowDropout(model, 1.0)
    with windows:
        windows.draw()
        assert torch.equal(model(ids).logits, hidden)
        with windows.shown():
            assert torch.equal(model(ids).logits, given)
        assert torch.equal(model(ids).logits, hidden)
    assert torch.equal(model(ids).logits, given)


def test_layers_are_drawn_apart_as_often_as_asked(tiny_folder):
    model = convert_model(AutoModelForCausalLM.from_pretrained(tiny_folder), MixerSpec(window=12))
    mixers = [layer.mixer for layer in model.attention_layers]
    torch.manual_seed(0)
    windows = WindowDropout(model, 0.25)
    drawn = []
    for _ in range(400):
        windows.draw()
        drawn.append([mixer.window == 1 for mixer in mixers])
    shares = torch.tensor(drawn, dtype=torch.float).mean(0)
    assert bool(((shares - 0.25).abs() < 0.08).all())
    assert any(len(set(row)) == 2 for row in drawn)
    never = WindowDropout(model, 0.0)
    before = torch.get_rng_state()
    never.draw()
    assert torch.equal(torch.get_rng_state(), before)  # runs without it stay what they were


def test_text_that_never_leaves_the_window_is_told(tiny_folder):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def model(**options):
        return convert_model(copy.deepcopy(teacher), MixerSpec(window=12, sinks=2, **options))

    def rows(tokens):
        return pack([Document([5] * tokens, [True] * tokens)] * 8, 4 * tokens)

    told = nothing_to_recall(model(), rows(14))
    assert told is not None
    assert told.startswith("the longest document has 14 tokens, and window and sinks read 14 exactly")
    assert nothing_to_recall(model(), rows(15)) is None
    assert nothing_to_recall(model(covers="all"), rows(14)) is None
    # 8 landmarks: the first block of 32 that has left the window overfills them.
    assert nothing_to_recall(model(landmarks=8), rows(14 + 31)) is not None
    assert nothing_to_recall(model(landmarks=8), rows(14 + 32)) is None


@pytest.mark.parametrize(
    ("stage", "options", "ends"),
    [
        ({"objective": "sft", "train": "mixer"}, {}, "this stage trains nothing but the recurrence"),
        ({"objective": "sft"}, {"adapters": False}, "this stage trains nothing but the recurrence"),
        ({"objective": "align"}, {}, "objective: align is 0 on such text"),
        ({"objective": "distill"}, {"untrained": True}, "objective: distill is 0 on such text"),
        ({"objective": "distill"}, {}, None),
        ({"objective": {"distill": 1.0, "sft": 1.0}}, {"untrained": True}, None),
        ({"objective": "sft", "train": "full"}, {"untrained": True}, None),
    ],
)
def test_a_stage_that_would_learn_nothing_ends(tiny_folder, stage, options, ends):
    model = convert_model(AutoModelForCausalLM.from_pretrained(tiny_folder), MixerSpec(window=12, sinks=2))
    rows = pack([Document([5] * 14, [True] * 14)] * 8, 14)
    spec = Stage.model_validate({"data": {"source": "a.txt"}, "length": 14, "batch_tokens": 14, **stage})
    options = {"adapters": True, "untrained": False, **options}
    if ends is None:
        told = check_something_to_learn(model, rows, spec, **options)
    else:
        with pytest.raises(DataError, match=ends) as caught:
            check_something_to_learn(model, rows, spec, **options)
        told = str(caught.value)
    for key in ("data.source", "raise the stage's length", "mixer.window"):
        assert key in told
    hidden = spec.model_copy(update={"hide_window": 0.5})
    assert check_something_to_learn(model, rows, hidden, **options) is None
    longer = pack([Document([5] * 15, [True] * 15)] * 8, 15)
    assert check_something_to_learn(model, longer, spec, **options) is None


def test_rows_without_loss_are_refused(tiny_folder):
    student = convert_model(AutoModelForCausalLM.from_pretrained(tiny_folder), MixerSpec(window=4, sinks=2))
    rows = pack([Document([5] * 32, [False] * 32)] * 2, 16)

    def check(objective):
        stage = {"data": {"source": "a.txt"}, "length": 16, "batch_tokens": 16, "objective": objective}
        return check_something_to_learn(student, rows, Stage.model_validate(stage), adapters=True, untrained=False)

    for objective in ("sft", "distill"):
        with pytest.raises(DataError, match=r"no token of the rows carries loss, .* rows of 16 tokens; raise"):
            check(objective)
    assert check("align") is None  # it compares the layers' outputs, on all tokens
