"""Baselines by name: how many bytes they have, and what they answer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
from linearize.conversion.swap import coding_of, convert_model, window_baseline
from linearize.errors import DataError
from linearize.evaluation.baselines import BRANCHES_OFF, equal_bytes, memory_bytes, silence
from linearize.evaluation.systems import BASELINES, evaluate, find_systems
from linearize.model.attention import LinearizedAttention
from linearize.recipe import KeepSpec, MixerSpec
from linearize.sources.source import find_source

from . import data_folder, tiny_model_folder

# Keys and values of a token in one layer of the tiny model: 4 heads, 16 channels in each of the two, float32.
TOKEN = 4 * (16 + 16) * 4


def teacher() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder()).eval()


def converted(spec: MixerSpec, weight: float = 0.5) -> Any:
    model = convert_model(teacher(), spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mix_weight" in name:
                parameter.fill_(weight)
    return model


def ids(count: int = 40) -> torch.Tensor:
    return torch.randint(3, 1000, (2, count), generator=torch.Generator().manual_seed(0))


def attentions(model: Any) -> list[LinearizedAttention]:
    return [module for module in model.modules() if isinstance(module, LinearizedAttention)]


def test_the_wide_window_has_the_bytes_of_the_whole_memory() -> None:
    model = converted(MixerSpec(window=16, sinks=2))
    base = model.config.text_config
    # By hand: keys twice (with and without positions) and values in the window, exact sinks, and per head a state of
    # 16 x 16 with 16 masses in float32; on top of it 8 bytes that count tokens.
    window, sinks, state = 16 * 4 * 48 * 4, 2 * TOKEN, 4 * (16 * 16 + 16) * 4
    held = window + sinks + state
    assert memory_bytes(base, model.config.mixers, torch.float32) == [(held + 8, 0)] * 2
    assert state_nbytes(model) == 2 * (held + 8)
    wide = equal_bytes(base, model.config.mixers, torch.float32)
    expected = held // TOKEN - 4  # the baseline has at least four sinks
    assert [(one["window"], one["layers"]) for one in wide] == [(expected, [0]), (expected, [1])]
    baseline = window_baseline(teacher(), wide)
    assert state_nbytes(model) - 2 * TOKEN < state_nbytes(baseline) <= state_nbytes(model)
    assert all(attention.mixer and attention.mixer.recurrence is None for attention in attentions(baseline))


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_the_wide_window_is_stored_as_the_model_is(stored: Any) -> None:
    model = converted(MixerSpec(window=16, sinks=2, landmarks=32, memory_dtype=stored))
    wide = equal_bytes(model.config.text_config, model.config.mixers, torch.float32)
    baseline = window_baseline(teacher(), wide)
    token = 4 * 2 * (16 + 2)  # keys and values of four heads in 8 bits, with a scale each
    assert state_nbytes(model) - 2 * token < state_nbytes(baseline) <= state_nbytes(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recurrence", ["gla", "gated_deltanet", "gsa", "mingru"])
def test_bytes_are_equal_up_to_one_token(recurrence: str, dtype: torch.dtype) -> None:
    spec = MixerSpec(window=8, recurrence=recurrence, keep=KeepSpec(heads={1: [2]}))  # type: ignore[arg-type]
    model = convert_model(teacher().to(dtype), spec)
    baseline = window_baseline(teacher().to(dtype), equal_bytes(model.config.text_config, model.config.mixers, dtype))
    assert state_nbytes(model) - 2 * TOKEN < state_nbytes(baseline) <= state_nbytes(model)
    assert growth_nbytes(baseline) == growth_nbytes(model) > 0


def test_bytes_of_a_transformer() -> None:
    config = teacher().config
    assert memory_bytes(config, [], torch.float32) == [(0, TOKEN)] * 2
    assert memory_bytes(config, [], torch.bfloat16) == [(0, TOKEN // 2)] * 2
    sliding = Gemma3TextConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert memory_bytes(sliding, [], torch.float32) == [(32 * 16 * 4, 0), (0, 16 * 4)]


@torch.inference_mode()
def test_without_its_recurrence_a_model_is_the_window_baseline() -> None:
    for mix in ("learned", "softmax", "fixed"):
        model = converted(MixerSpec(window=8, sinks=4, mix=mix))
        bare = window_baseline(teacher(), model.config.mixers)
        expected = bare(ids()).logits
        assert (model(ids()).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(silence(model, ["recurrence"])(ids()).logits, expected)
        assert (silence(model, [])(ids()).logits - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_without_its_window_a_layer_answers_what_the_recurrence_reads() -> None:
    model = converted(MixerSpec(window=8, sinks=2, mix="learned"), weight=1.0)
    hidden = torch.randn(1, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    attention = attentions(model)[0]
    positions = model.model.rotary_emb(hidden, torch.arange(30)[None])
    # With a weight of 1 the learned mix is the recurrence's reading wherever there is one.
    whole = attention(hidden, positions)[0]
    silence(model, ["window"])
    alone = attention(hidden, positions)[0]
    torch.testing.assert_close(alone[:, 11:], whole[:, 11:])
    assert alone[:, :10].abs().max() == 0  # eight tokens in the window and two as sinks: the state is empty
    assert alone[:, 10:].abs().amin(1).max() > 0
    silence(model, ["recurrence", "window"])
    assert attention(hidden, positions)[0].abs().max() == 0


@pytest.mark.parametrize("off", BRANCHES_OFF.values())
@pytest.mark.parametrize("covers", ["evicted", "all"])
@torch.inference_mode()
def test_branches_are_one_function_whole_and_token_by_token(off: Sequence[str], covers: Any) -> None:
    model = silence(converted(MixerSpec(window=8, sinks=0 if covers == "all" else 2, covers=covers)), off)
    text, cache, steps = ids(24), None, []
    for token in text.split(1, 1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(text).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_is_kept_stays_on() -> None:
    spec = MixerSpec(window=8, keep=KeepSpec(layers=[0]))
    model = silence(converted(spec), ["recurrence", "window"])
    assert [bool(one.mixer and one.mixer.branches_off) for one in attentions(model)] == [False, True]
    sliding = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip
    silenced = silence(convert_model(sliding, MixerSpec(window=4)), ["window"])
    assert [bool(one.mixer and one.mixer.branches_off) for one in attentions(silenced)] == [False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("baselines") / "model"
    converted(MixerSpec(window=16), weight=0.9).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny_model_folder()).save_pretrained(target)
    (target / "linearize.json").write_text(f'{{"base": {{"model": "{tiny_model_folder()}"}}}}')
    return target


def test_all_baselines_of_a_converted_model(folder: Path) -> None:
    source = find_source(str(folder))
    systems = {one.info.name: one for one in find_systems(source, find_source(str(tiny_model_folder())), ["all"])}
    assert list(systems) == [*BASELINES, "model"]
    assert all(one.info.description for one in systems.values())
    loaded = {name: one.load() for name, one in systems.items()}
    with torch.inference_mode():
        logits = {name: model(ids()).logits for name, model in loaded.items()}
    torch.testing.assert_close(logits["no_recurrence"], logits["window"])
    others = [name for name in systems if name != "no_recurrence"]
    for number, one in enumerate(others):
        assert all((logits[one] - logits[other]).abs().max() > 1e-3 for other in others[:number])
    for name, model in loaded.items():
        if name != "teacher":
            assert systems[name].info.state_bytes == state_nbytes(model), name
            assert systems[name].info.growth_bytes_per_token == 0
    assert systems["teacher"].info.state_bytes == 0
    assert systems["teacher"].info.growth_bytes_per_token == 2 * TOKEN
    assert systems["window_bytes"].info.state_bytes <= systems["model"].info.state_bytes  # type: ignore[operator]
    assert "window of 16 tokens" not in systems["window_bytes"].info.description
    stamps = {one.load.stamp for one in systems.values()}  # type: ignore[attr-defined]
    assert len(stamps) == len(systems) and None not in stamps


def test_baselines_of_a_model_of_slots_alone(tmp_path: Path) -> None:
    """It has no recurrence to turn off, and its windows store keys by its own scale."""
    model = converted(MixerSpec(window=16, recurrence="none", landmarks=8, memory_dtype="int8"))
    for value in coding_of(model).values():
        value.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    found = find_systems(find_source(str(tmp_path)), find_source(str(tiny_model_folder())), ["all"])
    systems = {one.info.name: one for one in found}
    assert list(systems) == ["teacher", "window", "window_bytes", "no_window", "model"]
    for name in ("window", "window_bytes"):
        stored = coding_of(systems[name].load())
        assert stored and all(torch.equal(value, stored[key]) for key, value in coding_of(model).items())
    stamps = {one.load.stamp for one in systems.values()}  # type: ignore[attr-defined]
    assert len(stamps) == len(systems) and None not in stamps


def test_baselines_of_a_model_that_is_not_converted(folder: Path) -> None:
    source = find_source(str(tiny_model_folder()))
    assert [one.info.name for one in find_systems(source, source, ["all"])] == ["window", "window_bytes", "teacher"]
    for system in find_systems(source, source, ["window", "window_bytes"], "int8")[:2]:
        assert system.load().config.mixers  # of the model itself, which is not rounded for them
    with pytest.raises(DataError, match=r"no_window: .* is not converted"):
        find_systems(source, source, ["no_window"])
    with pytest.raises(DataError, match=r"unknown baseline 'teecher'; did you mean teacher\?"):
        find_systems(source, source, ["teecher"])


@pytest.mark.public  # rests on a model that was trained well
def test_a_branch_that_is_off_shows_in_scores(folder: Path) -> None:
    results = evaluate(find_source(str(folder)), ["wikitext2"], baselines=["all"], options=_options(), limit=1)
    loss = {name: scores.tasks[0].value for name, scores in results.scores.items()}
    assert loss["no_recurrence"] == pytest.approx(loss["window"], rel=1e-5)
    assert loss["teacher"] < loss["window_bytes"] < loss["window"] < min(loss["no_window"], loss["neither"])
    assert loss["no_window"] != loss["neither"]  # the recurrence was never trained, so it need not help
    assert loss["model"] not in (loss["window"], loss["no_window"])
    assert set(results.digests) == {"wikitext2"}
    assert results.limit == 1


def test_what_int8_costs_is_measured_against_the_teacher_as_it_is(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    tokens = torch.arange(2 * 48).reshape(2, 48) % 500
    save_file({"input_ids": tokens, "labels": tokens.clone()}, model / "held_out.safetensors")
    source = find_source(str(model))
    rows = {
        dtype: {name: one.rows for name, one in evaluate(source, baselines=["teacher"], dtype=dtype).scores.items()}
        for dtype in ("auto", "int8")
    }
    plain, int8 = rows["auto"], rows["int8"]
    assert torch.equal(plain["teacher"].loss, int8["teacher"].loss)
    assert float(int8["teacher"].kl.abs().max()) < 1e-6
    assert not torch.equal(plain["model"].loss, int8["model"].loss)
    # The divergence is from the teacher in float, whatever the model is in.
    torch.testing.assert_close(int8["model"].kl, plain["model"].kl, rtol=0.2, atol=0.02)


def _options() -> Any:
    from linearize.evaluation.tasks.suites import SuiteOptions

    return SuiteOptions(data=data_folder())
