"""What windowing a part costs, against the teacher under a mask; and a head that is planted is found."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.conversion.swap import convert_model
from linearize.data.rows import Document, pack
from linearize.evaluation.tasks.recall.words import NOUNS
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM
from linearize.probe import Budget, Probe, ProbeOptions, run_probe
from linearize.probe.damage import Part, all_but, convertible_layers, damage, everything_but, parts_of, read, windowed
from linearize.probe.needles import Needle, make_needles
from linearize.recipe import KeepSpec, MixerSpec, SourceSpec, load_recipe
from linearize.sources.source import find_source
from tests.model.test_families import build, text
from tests.probe.planted import BEFORE, COPIES, planted_folder

LENGTH, WINDOW, SINKS = 90, 16, 3


def eager(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LinearizedForCausalLM:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    return LinearizedForCausalLM.from_teacher(teacher, [])


@pytest.fixture(scope="module")
def ids(tiny_folder: Path) -> torch.Tensor:
    vocabulary = eager(tiny_folder).config.vocab_size
    return torch.randint(5, vocabulary, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def masked_logits(folder: Path, ids: torch.Tensor, part: Part) -> torch.Tensor:
    """The teacher's, with a mask of window and sinks on one layer's weights, or on those of one group of heads."""
    teacher = eager(folder)
    place = torch.arange(ids.shape[1])
    causal = place <= place[:, None]
    near = causal & ((place > place[:, None] - WINDOW) | (place < SINKS))
    group = teacher.config.num_attention_heads // teacher.config.num_key_value_heads
    seen = torch.stack(
        [near if part.head in (None, h // group) else causal for h in range(teacher.config.num_attention_heads)]
    )
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]

    def exchange(module, arguments, keywords):
        return arguments, {**keywords, "attention_mask": mask}

    teacher.model.layers[part.layer].self_attn.register_forward_pre_hook(exchange, with_kwargs=True)
    with torch.no_grad():
        return teacher(ids).logits.double()


def row_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("part", [Part(0), Part(1), Part(0, 1), Part(1, 0)], ids=str)
def test_damage_is_that_of_a_mask_on_the_teacher(model, ids, tiny_folder, part):
    needle = Needle(ids[0].tolist(), range(20, 24), range(80, 84))
    rows = pack([Document(row, [True] * LENGTH) for row in ids.tolist()], LENGTH)
    layers = family_of(model.config.text_config).layers(model.config)
    base = read(model, rows, [needle])
    with windowed(model, all_but(part, layers), window=WINDOW, sinks=SINKS):
        found = damage(base, read(model, rows, [needle]))
    whole, masked = eager(tiny_folder)(ids).logits.detach().double(), masked_logits(tiny_folder, ids, part)
    rise = row_losses(masked, ids) - row_losses(whole, ids)
    assert found.loss.mean == pytest.approx(float(rise.mean()), abs=1e-5)
    assert found.loss.stderr == pytest.approx(float(rise.std() / 3**0.5), abs=1e-5)
    at = torch.arange(79, 83)
    before, after = (x[0].log_softmax(-1)[at, ids[0, at + 1]].mean() for x in (whole, masked))
    assert found.recall.mean == pytest.approx(float(before - after), abs=1e-5)
    assert abs(found.loss.mean) > 1e-3
    again = read(model, rows, [needle])
    assert torch.equal(again.loss, base.loss) and torch.equal(again.recall, base.recall)


@pytest.mark.parametrize("row", ["mistral, sliding", "gemma2", "smollm3, mixed", "gpt2", "falcon, grouped"])
def test_all_windowed_is_the_conversion_without_a_recurrence(row):
    (tokens,) = text(60)
    spec = MixerSpec(recurrence="none", window=12, sinks=3)
    layers = family_of(build(row).config).layers(build(row).config)
    convertible = convertible_layers(layers, spec)
    assert len(convertible) == (1 if len({layer.window for layer in layers}) > 1 else len(layers))
    plain = LinearizedForCausalLM.from_teacher(copy.deepcopy(build(row)), [])
    with torch.no_grad():
        whole, expected = plain(tokens).logits, convert_model(copy.deepcopy(build(row)), spec)(tokens).logits
        with windowed(plain, everything_but([], convertible), window=12, sinks=3):
            assert torch.equal(plain(tokens).logits, expected)
        with windowed(plain, everything_but([Part(convertible[0])], convertible), window=12, sinks=3):
            kept = spec.model_copy(update={"keep": KeepSpec(layers=convertible[:1])})
            if len(convertible) > 1:
                assert torch.equal(plain(tokens).logits, convert_model(copy.deepcopy(build(row)), kept)(tokens).logits)
        assert torch.equal(plain(tokens).logits, whole) and not torch.equal(whole, expected)


def test_everything_but_some_parts(model):
    layers = family_of(model.config.text_config).layers(model.config)
    assert everything_but([], [0, 1]) == {0: [], 1: []}
    assert everything_but([Part(1)], [0, 1]) == {0: []}
    assert everything_but([Part(1, 1), Part(0, 0), Part(1, 0)], [0, 1]) == {0: [0], 1: [1, 0]}
    assert parts_of(layers, [1], "heads") == [Part(1, head) for head in range(layers[1].key_value_heads)]


def test_needles_stand_where_they_say(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    options = {"count": 4, "length": 448, "window": 48, "sinks": 4, "seed": 1}
    needles = make_needles(tokenizer, ["One day a dog ran. It ran far!"], **options)
    assert needles == make_needles(tokenizer, ["One day a dog ran. It ran far!"], **options)
    assert len(needles) == 4 and len({needle.value for needle in needles}) > 1
    for needle in needles:
        value, answer = (
            "".join(filter(str.isdigit, tokenizer.decode([needle.ids[i] for i in at])))
            for at in (needle.value, needle.answer)
        )
        assert len(needle.ids) <= 448 and len(value) == 7 and value == answer
        assert needle.answer.start - needle.value.stop >= 48 and needle.value.start >= 4
        assert needle.asking.stop == needle.answer.stop - 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    folder = planted_folder(tmp_path_factory.mktemp("planted"))
    file = folder / "text.txt"
    rng = random.Random(0)  # noqa: S311
    file.write_text(" ".join(rng.choices(NOUNS, k=600)))
    options = ProbeOptions(
        text=SourceSpec(source=str(file)), tokens=1280, length=640, damage="heads", budget=Budget(share=0.2)
    )
    return run_probe(find_source(str(folder)), load_recipe("window-gla", ["mixer.window=48"]), options)


def test_a_planted_head_is_found(planted):
    layer, head = COPIES
    scores = {(i, h): one.retrieval for i, heads in enumerate(planted.heads) for h, one in enumerate(heads)}
    assert scores.pop(COPIES) > 0.5 > 5 * max(scores.values())
    assert planted.heads[layer][head].beyond > 0.5
    local = planted.heads[BEFORE[0]][BEFORE[1]]
    assert local.window > 0.95 and local.half_life == 1


def test_what_a_planted_head_does_is_lost_with_it(planted):
    assert planted.recall_counts and planted.ranked()[0] == Part(*COPIES)
    worst = planted.parts[Part(*COPIES)].recall
    others = [one.recall.mean for part, one in planted.parts.items() if part != Part(*COPIES)]
    assert worst.mean > 0.5 and max(map(abs, others)) < 0.01
    assert planted.kept.parts[0] == Part(*COPIES) and planted.kept.section["heads"][1] == [2]
    assert abs(planted.kept.damage.recall.mean) < 0.01 < planted.windowed.recall.mean
