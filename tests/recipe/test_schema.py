"""What the schema accepts, refuses and fills in."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from linearize.recipe import DataSpec, GateSpec, KeepSpec, LoraSpec, MixerSpec, Recipe, Stage, load_recipe

SELF = {"source": "self"}


def stage(**keys: object) -> Stage:
    return Stage.model_validate({"objective": "distill", "data": SELF} | keys)


def test_defaults_are_the_contract() -> None:
    recipe = Recipe()
    assert recipe.mixer == MixerSpec(
        recurrence="gla", window=64, sinks=4, mix="learned", covers="evicted", feature_map="softmax", normalize=True
    )
    assert recipe.mixer.gate == GateSpec(scale=None, bias=None, divisor=1.0, learned=True)
    assert recipe.lora == LoraSpec(rank=8, alpha=8, dropout=0.0, targets=["q", "k", "v"])
    assert (recipe.model, recipe.teacher, recipe.stages, recipe.seed, recipe.dtype) == (None, None, [], 0, "auto")


def test_liger_gla_is_the_papers_configuration() -> None:
    recipe = load_recipe("liger-gla")
    assert recipe.mixer == MixerSpec(
        recurrence="gla",
        window=64,
        sinks=0,
        mix="fixed",
        covers="all",
        feature_map="softmax",
        normalize=False,
        gate=GateSpec(scale=1.0, bias=0.0, divisor=16.0, learned=False),
    )
    (only,) = recipe.stages
    assert (only.objective, only.length, only.epochs, only.lr, only.clip) == ("sft", 1024, 2, 1e-3, 1.0)
    assert only.batch_tokens == 8 * 1024
    assert (only.data.source, only.data.format) == ("yahma/alpaca-cleaned", "instruction")


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("liger-hgrn2", {"recurrence": "hgrn2", "gate": GateSpec(scale=1.0, bias=0.0, divisor=1.0, learned=False)}),
        ("liger-gsa", {"recurrence": "gsa", "feature_map": "identity", "slots": 0}),
        ("liger-gla-h", {"keep": KeepSpec(every=8)}),
    ],
)
def test_the_papers_others_differ_from_liger_gla_in_the_mixer_alone(name: str, mixer: dict[str, object]) -> None:
    paper, recipe = load_recipe("liger-gla"), load_recipe(name)
    assert recipe.mixer == paper.mixer.model_copy(update=mixer)
    assert (
        recipe.model_copy(update={"mixer": paper.mixer, "description": paper.description, "measured": paper.measured})
        == paper
    )


def test_text_that_the_teacher_writes_has_a_budget() -> None:
    assert DataSpec(source="self").tokens == 200_000
    assert DataSpec(source="self", tokens=7).tokens == 7
    assert DataSpec(source="text.txt").tokens is None


def test_a_stage_reads_one_source_or_a_mixture() -> None:
    mix = [{"source": "self", "weight": 3}, {"source": "recall"}]
    data = DataSpec.model_validate({"mix": mix, "tokens": 1000})
    assert [(one.source, one.weight) for one in data.mix] == [("self", 3.0), ("recall", 1.0)]
    assert data.sources == data.mix and DataSpec(source="a.txt").sources == [DataSpec(source="a.txt")]
    for wrong in ({"mix": mix}, {"mix": mix, "tokens": 9, "source": "self"}, {"mix": [{"weight": 1}], "tokens": 9}):
        with pytest.raises(ValidationError, match=r"expected a source|keep one of them|expected how many"):
            DataSpec.model_validate(wrong)


def test_weights_of_a_stage() -> None:
    assert stage().weights == {"distill": 1.0}
    assert stage(objective={"distill": 0.9, "sft": 1}).weights == {"distill": 0.9, "sft": 1.0}


def test_a_recipe_does_not_change_once_read() -> None:
    with pytest.raises(ValidationError):
        Recipe().mixer.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": {}},
        {"objective": {"distil": 1.0}},
        {"objective": {"sft": 0.0}},
        {"objective": {"sft": float("inf")}},
        {"objective": {"sft": True}},
        {"objective": ["sft"]},
        {"objective": {"align": 1.0, "sft": 1.0}},
        {"objective": "align", "beyond": 1.1},
        {"objective": "align", "teacher_at": "disk", "top_k": 8},
        {"objective": "sft", "teacher_at": "disk", "top_k": 8},
        {"teacher_at": "disk"},
        {"length": 512, "batch_tokens": 256},
        {"length": 1000},
        {"length": "512"},
        {"length": True},
        {"length": 512.0},
        {"lr": "1e-3"},
        {"lr": float("nan")},
        {"warmup": 1.5},
        {"epochs": 0},
        {"gradient_checkpointing": 1},
        {"data": {}},
        {"data": {"source": ""}},
        {"data": SELF | {"temperature": 0}},
        {"learning_rate": 1e-3},
    ],
)
def test_stages_that_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        stage(**keys)


def test_a_seed_is_one_that_all_generators_take() -> None:
    assert Recipe(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ValidationError):
        Recipe(seed=2**32)


def test_softmax_mix_needs_a_normaliser() -> None:
    assert MixerSpec(mix="softmax").normalize
    with pytest.raises(ValidationError, match="mix: softmax needs normalize: true"):
        MixerSpec(mix="softmax", normalize=False)
