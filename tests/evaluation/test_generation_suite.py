"""A teacher beside itself, a damaged model beside its teacher, and what the tasks' texts depend on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel

from linearize.conversion.swap import convert_model
from linearize.errors import DataError, ModelError
from linearize.evaluation.tasks import fewshot, hidden, reading
from linearize.evaluation.tasks.excerpts import PAGES, page_prompts
from linearize.evaluation.tasks.fewshot import FewShot, is_right, questions
from linearize.evaluation.tasks.generation_suite import generation_tasks, repeated
from linearize.evaluation.tasks.names import GENERATION
from linearize.evaluation.tasks.reading import greedy, sampled, write
from linearize.evaluation.tasks.task import Item
from linearize.recipe import MixerSpec

BESIDE_TEACHER = ["agreement", "common_prefix", "kl_teacher_text", "kl_own_text", "repetition"]


@pytest.fixture(scope="module")
def broken(tiny: Any) -> Any:
    """The teacher with noise on its weights."""
    model, generator = copy.deepcopy(tiny), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WikiText pages of a few stories each."""
    folder: Path = tmp_path_factory.mktemp("data")
    story = "Once upon a time there was a {0} named {1} who liked to play in the park with a red ball , and {1} 's mom"
    pages = []
    for page, animal in enumerate(["dog", "cat", "bird", "fish", "bear"]):
        lines = [f"{story.format(animal, name)} said no . " * 3 for name in ("Tom", "Lily", "Ben")]
        pages.append(f" = Page {page} = \n \n = = Part = = \n " + " \n ".join(lines))
    (folder / PAGES).parent.mkdir()
    (folder / PAGES).write_text("\n".join(pages), encoding="utf-8")
    return folder


def build(
    tokenizer: Any, data: Path, teacher: Any, names: list[str] = BESIDE_TEACHER, **options: Any
) -> dict[str, Any]:
    settings = {"samples": 4, "prompt_tokens": 24, "new_tokens": 16, **options}
    tasks = generation_tasks(tokenizer, names, teacher=lambda: teacher, data=data, **settings)
    return {task.name: task for task in tasks}


def means(tasks: dict[str, Any], model: Any, batch_size: int = 3) -> dict[str, float]:
    found = {}
    for name, task in tasks.items():
        items = task.score(model, None, range(len(task)), batch_size)
        found[name] = task.summary([item.value for item in items], [{}] * len(items))[0]
    return found


def test_a_teacher_beside_itself_and_a_damaged_model(tokenizer: Any, data: Path, tiny: Any, broken: Any) -> None:
    tasks = build(tokenizer, data, tiny)
    same, worse = means(tasks, copy.deepcopy(tiny)), means(tasks, broken)
    assert same["agreement"] == same["common_prefix"] == 1
    assert abs(same["kl_teacher_text"]) < 1e-6
    assert abs(same["kl_own_text"]) < 1e-6
    assert worse["agreement"] < 0.9
    assert worse["common_prefix"] < 0.5
    assert worse["kl_teacher_text"] > 0.05
    assert worse["kl_own_text"] > 0.05
    assert means(tasks, tiny) == pytest.approx(same, abs=1e-6)  # nothing of the damaged model was kept


def test_values_equal_plain_arithmetic(tokenizer: Any, data: Path, tiny: Any, broken: Any) -> None:
    tasks = build(tokenizer, data, tiny)
    item = tasks["kl_teacher_text"].score(broken, tokenizer, [1], 1)[0]
    prompt = tasks["agreement"].texts.prompts[1]
    with torch.no_grad():
        ids = tiny.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        log_p, log_q = (log_softmax(model(ids).logits[0, 23:-1].double(), -1) for model in (tiny, broken))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        share = float((log_q.argmax(-1) == ids[0, 24:]).double().mean())
    assert item.curve == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    assert item.value == pytest.approx(float(kl.mean()), rel=1e-4)
    assert list(tasks["kl_teacher_text"].axis) == list(range(1, 17))
    assert tasks["agreement"].score(broken, tokenizer, [1], 1) == [Item(share)]


def test_sampled_texts_depend_on_seed_and_item_alone(tokenizer: Any, data: Path, tiny: Any, broken: Any) -> None:
    first, again = build(tokenizer, data, tiny)["kl_own_text"], build(tokenizer, data, tiny)["kl_own_text"]
    backwards = again.score(broken, tokenizer, [3, 2, 1, 0], 1)[::-1]
    values = [item.value for item in first.score(broken, tokenizer, [0, 1, 2, 3], 4)]
    assert values == pytest.approx([item.value for item in backwards], rel=1e-4)
    prompts = first.texts.prompts
    other = write(broken, prompts, 16, sampled(1, range(4)))
    assert not torch.equal(first.texts.sampled_by(broken, range(4), 4), other)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    drawn = sampled(0, range(4000))(logits, 0)
    assert (torch.bincount(drawn) / 4000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_writing_with_pads_and_on_a_converted_model(tiny: Any) -> None:
    prompts = [[1, 300, 301, 302, 303, 304], [1, 40, 41], [1, 500, 17, 18]]
    prompts = [[token % tiny.config.vocab_size for token in prompt] for prompt in prompts]
    converted = convert_model(copy.deepcopy(tiny), MixerSpec(window=4)).eval()
    for model in (tiny, converted):
        with torch.no_grad():
            together = write(model, prompts, 8, greedy)
            alone = torch.cat([write(model, [prompt], 8, greedy) for prompt in prompts])
        assert torch.equal(together, alone)


def test_pieces_are_one_forward_pass(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(2 * 150).reshape(2, 150) % tiny.config.vocab_size
    for model in (tiny, convert_model(copy.deepcopy(tiny), MixerSpec(window=8)).eval()):
        with torch.no_grad():
            whole = model(ids).logits
            monkeypatch.setattr(hidden, "TOKENS", 1)
            monkeypatch.setattr(hidden, "_SHORTEST", 7)
            monkeypatch.setattr(hidden, "LOGITS", 2 * 5 * model.config.get_text_config().vocab_size)
            for first in (0, 20):
                found = list(reading.pieces(model, ids, first))
                sizes = [logits.shape[1] for _, logits in found]
                assert [start for start, _ in found] == [first + sum(sizes[:at]) for at in range(len(found))]
                assert max(sizes) == 5
                joined = torch.cat([logits for _, logits in found], 1)
                torch.testing.assert_close(joined, whole[:, first:], rtol=1e-4, atol=1e-4)


def test_the_teacher_is_loaded_once_and_only_when_needed(tokenizer: Any, data: Path, tiny: Any) -> None:
    loads = []

    def load() -> Any:
        loads.append(1)
        return tiny

    names = [*BESIDE_TEACHER, "few_shot_exact"]
    tasks = generation_tasks(tokenizer, names, teacher=load, data=data, samples=2, prompt_tokens=8, new_tokens=4)
    by_name = {task.name: task for task in tasks}
    by_name["repetition"].score(tiny, tokenizer, [0, 1], 2)
    assert by_name["repetition"].digest
    assert by_name["few_shot_exact"].digest
    assert not loads
    for task in tasks:
        task.score(tiny, tokenizer, [0, 1], 2)
        assert task.digest
    assert len(loads) == 1


def test_digests_tell_settings_and_teachers_apart(tokenizer: Any, data: Path, tiny: Any, broken: Any) -> None:
    def digests(teacher: Any, **options: Any) -> dict[str, str]:
        return {name: task.digest for name, task in build(tokenizer, data, teacher, **options).items()}

    plain = digests(tiny)
    assert plain == digests(copy.deepcopy(tiny))
    assert len(set(plain.values())) == len(BESIDE_TEACHER)
    for options in ({"samples": 3}, {"seed": 1}, {"prompt_tokens": 20}, {"new_tokens": 12}):
        assert not set(plain.values()) & set(digests(tiny, **options).values())
    assert [name for name, digest in digests(broken).items() if digest == plain[name]] == ["repetition"]
    assert FewShot(tokenizer, samples=3, seed=0).digest != FewShot(tokenizer, samples=3, seed=1).digest


def test_repeated_ngrams() -> None:
    assert repeated([1, 2, 3, 4, 5, 6]) == 0
    assert repeated([7] * 10) == pytest.approx(1 - 1 / 7)
    assert repeated([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repeated([1, 2, 3]) == 0
    assert repeated([1, 2, 3, 4, 9, 1, 2, 3, 4], frozenset({9})) == 0


def test_prompts(tokenizer: Any, data: Path) -> None:
    prompts = page_prompts(tokenizer, data, samples=7, tokens=24, seed=0)
    assert [len(prompt) for prompt in prompts] == [24] * 7
    assert prompts == page_prompts(tokenizer, data, samples=9, tokens=24, seed=0)[:7]
    assert prompts != page_prompts(tokenizer, data, samples=7, tokens=24, seed=1)
    assert len({tokenizer.decode(prompt)[:50] for prompt in prompts[:5]}) == 5  # one of each page
    text = tokenizer.decode(page_prompts(tokenizer, data, samples=1, tokens=60, seed=0)[0])
    assert "ball, and" in text
    assert " '" not in text


def test_few_shot_questions() -> None:
    asked = questions(10, seed=0)
    assert asked == questions(20, seed=0)[:10]
    assert all(question.back > fewshot.FAR for question in asked[1::2])
    assert any(question.back <= fewshot.FAR for question in asked[::2])
    assert asked != questions(10, seed=1)
    for question in asked:
        *lines, last = question.prompt.split("\n")
        pairs = [tuple(line.split(" -> ")) for line in lines]
        labels = [label for _, label in pairs]
        assert sorted(labels) == sorted(fewshot.LABELS * fewshot.PER_KIND)
        word = last.removesuffix(" ->")
        assert word not in dict(pairs)
        kind = next(kind.split() for kind in fewshot._KINDS if word in kind.split())
        assert {label for shown, label in pairs if shown in kind} == {question.answer}
        assert labels[-question.back] == question.answer
        assert question.answer not in labels[len(labels) - question.back + 1 :]


@pytest.mark.parametrize(
    ("text", "right"),
    [(" B", True), (" B\nlion", True), ("B \n", True), (" BB\n", False), (" A\n", False), ("\nB", False), ("", False)],
)
def test_few_shot_scoring(text: str, right: bool) -> None:
    assert is_right(text, "B") is right


def test_few_shot_answers(tokenizer: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = FewShot(tokenizer, samples=5, seed=0)
    answers = [task.questions[0].answer, "Z", task.questions[2].answer, "Z", "Z"]
    ids = [tokenizer(f"{answer}\n", add_special_tokens=False).input_ids[:3] for answer in answers]
    ids = [row + [row[-1]] * (3 - len(row)) for row in ids]
    given = iter([torch.tensor(ids[:3]), torch.tensor(ids[3:])])
    monkeypatch.setattr(fewshot, "write", lambda *_: next(given))
    assert [item.value for item in task.score(tiny, tokenizer, range(5), 3)] == [1, 0, 1, 0, 0]
    assert task.tags(0) == {"back": task.questions[0].back}


@pytest.mark.parametrize("name", [*BESIDE_TEACHER, "few_shot_exact"])
def test_logits_that_are_not_finite(name: str, tokenizer: Any, data: Path, tiny: Any) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.full_like(model.lm_head.weight, torch.nan))
    task = build(tokenizer, data, tiny, [name])[name]
    with pytest.raises(ModelError, match=rf"^task {name}, item 3: the model's logits .*not finite"):
        task.score(model, tokenizer, [2, 1], 2)


@pytest.mark.parametrize("name", ["kl_teacher_text", "few_shot_exact"])
def test_too_much_for_memory_or_positions(
    name: str, tokenizer: Any, data: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(tokenizer, data, tiny, [name])[name]
    config = GPT2Config(vocab_size=tiny.config.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ModelError, match=r"learned 32 positions"):
        task.score(GPT2LMHeadModel(config), tokenizer, [0], 1)

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = copy.deepcopy(tiny)
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ModelError, match=rf"^task {name}: memory does not hold 2 texts of .* smaller batch size"):
        task.score(model, tokenizer, [0, 1], 2)


def test_what_a_user_can_get_wrong(tokenizer: Any, data: Path, tiny: Any, tmp_path: Path) -> None:
    for name, match in (("agrement", "did you mean agreement"), ("zzz", f"choose from {', '.join(GENERATION)}")):
        with pytest.raises(DataError, match=match):
            build(tokenizer, data, tiny, [name])
    for option in ("samples", "prompt_tokens", "new_tokens"):
        with pytest.raises(DataError, match=f"{option} is 0"):
            build(tokenizer, data, tiny, **{option: 0})
    with pytest.raises(DataError, match=r"only 15 prompts of 24 tokens and 99"):
        build(tokenizer, data, tiny, samples=99)
    with pytest.raises(DataError, match=r"cannot be read from .*wiki\.test\.raw"):
        build(tokenizer, tmp_path, tiny)
    with pytest.raises(DataError, match="--data DIR"):
        generation_tasks(tokenizer, ["agreement"], teacher=lambda: tiny, data=None)


def test_a_model_with_another_vocabulary(tokenizer: Any, data: Path, tiny: Any) -> None:
    wider = copy.deepcopy(tiny)
    wider.resize_token_embeddings(tiny.config.vocab_size + 8)
    task = build(tokenizer, data, tiny, ["kl_teacher_text"])["kl_teacher_text"]
    with pytest.raises(ModelError, match="only models with one tokenizer"):
        task.score(wider, tokenizer, [0], 1)
