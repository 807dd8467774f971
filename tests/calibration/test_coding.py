"""Tests of the channels' scale and shift before keys are coded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from linearize.conversion.swap import coding_of, window_baseline
from linearize.errors import RecipeError
from linearize.jobs.convert import convert
from linearize.sources.source import find_source, load_model
from tests.conftest import random_llama
from tests.made import LANDMARKS

CHANGES = ["mixer.landmarks=64", "mixer.landmarks_by=null", "mixer.memory_dtype=int4", "mixer.window=8"]


@pytest.fixture
def biased(tmp_path):
    """A model whose keys have large biases in channels that turn slowly."""
    folder = random_llama(tmp_path / "biased")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.view(2, 16)[:, 7] = 100.0
    model.save_pretrained(folder)
    return folder


def test_codes_do_not_spend_their_range_on_biases(biased, tmp_path):
    ids = torch.randint(5, 90, (1, 96), generator=torch.Generator().manual_seed(0))

    def apart(model) -> float:
        return float((model(input_ids=ids).logits - wanted).square().mean())

    with torch.no_grad():
        wanted = load_model(find_source(str(biased))).eval()(input_ids=ids).logits
        model = convert(str(biased), tmp_path / "out", LANDMARKS, overrides=["mixer.recurrence=none", *CHANGES]).eval()
        # The slots hold every token, so only the codes differ from the pretrained model.
        fitted = apart(model)
        for name, parameter in model.named_parameters():
            if name.endswith(("key_scale", "key_shift")):
                parameter.fill_(float(name.endswith("key_scale")))
        assert fitted < 0.05 * apart(model)


@pytest.mark.parametrize("stored", ["memory_dtype=int8", "memory_dtype=int4"])
def test_a_window_beside_no_landmark_is_coded_in_the_same_way(biased, tmp_path, stored):
    """A layer that has no landmark stores its window in 8 bits, too; so does the baseline that is a window alone."""
    ids = torch.randint(5, 90, (1, 96), generator=torch.Generator().manual_seed(0))
    changes = [*CHANGES, "mixer.recurrence=none", "mixer.window=128", "mixer.landmark_layers={0: 64, 1: 0}"]
    changes.append("mixer.landmark_score=learned")  # for which text is read, also with int8

    def apart(model) -> float:
        with torch.no_grad():
            return float((model(input_ids=ids).logits - wanted).square().mean())

    teacher = load_model(find_source(str(biased))).eval()
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits
    model = convert(str(biased), tmp_path / "out", LANDMARKS, overrides=[*changes, f"mixer.{stored}"]).eval()
    coding = coding_of(model)
    assert {name.split(".mixer.")[0] for name in coding} == {f"model.layers.{layer}.self_attn" for layer in (0, 1)}
    baselines = [window_baseline(copy.deepcopy(teacher), model.config.mixers, given).eval() for given in (coding, None)]
    assert apart(baselines[0]) < 0.05 * apart(baselines[1])
    fitted = apart(model)
    for name, parameter in coding_of(model).items():
        if ".layers.1." in name:
            parameter.fill_(float(name.endswith("key_scale")))
    assert fitted < 0.1 * apart(model)


def test_a_state_refuses_keys_that_are_too_much_alike(biased, tmp_path):
    with pytest.raises(RecipeError, match=r"mixer\.memory_dtype: the keys of layer 0 are so alike that rounding"):
        convert(str(biased), tmp_path / "out", LANDMARKS, overrides=CHANGES)
    assert not (tmp_path / "out").exists()
