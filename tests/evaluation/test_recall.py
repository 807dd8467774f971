"""Recall tasks: the papers' own words at the right place and length, and answers that are counted right."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from linearize.conversion.swap import convert_model, mixers_for, window_baseline
from linearize.errors import DataError, ModelError
from linearize.evaluation.tasks import hidden
from linearize.evaluation.tasks.names import RECALL
from linearize.evaluation.tasks.recall import RecallTask, recall_tasks, running, several, texts
from linearize.evaluation.tasks.recall import tasks as tasks_module
from linearize.families import family_of
from linearize.recipe import MixerSpec

NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.fixture
def model(tiny_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose book is 1,000 sentences of different words."""
    folder = tmp_path_factory.mktemp("data")
    sentences = [f"Mr. Brown{i} said that stone {i} lay{chr(10)}in the river." for i in range(1000)]
    book = folder / texts.ESSAY
    book.parent.mkdir()
    head = "\ufeffLicensed to all.\n*** START OF THIS BOOK ***\n\nCHAPTER I\n\n"
    book.write_text(f"{head}{' '.join(sentences)}\n*** END OF THIS BOOK ***\nMore licence.\n", encoding="utf-8")
    return folder


def rng() -> Random:
    return Random(3)  # noqa: S311 - to be repeated


def build(tokenizer: Any, name: str, data: Path | None = None, **options: Any) -> RecallTask:
    return recall_tasks(tokenizer, [name], data=data, **{"lengths": [1024], "samples": 1, **options})[0]


def prompts(task: RecallTask, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row.ids, skip_special_tokens=True) for row in task.rows]


def test_the_noise_needle_is_rulers() -> None:
    draft = texts.niah_noise(rng(), 0.5)
    key = re.search(r"text for|number for (\S+) mentioned", draft.prefix).group(1)
    assert re.fullmatch(r"[1-9]\d{6}", draft.answers[0])
    assert re.fullmatch(r"[a-z]+-[a-z]+", key)
    assert draft.build(12) + draft.prefix == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        f"{NOISE_LINE}\n"
        f"One of the special magic numbers for {key} is: {draft.answers[0]}.\n"
        f"{NOISE_LINE}\n"
        "The grass is green. The sky is blue.\n"
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def test_the_essay_needle_is_rulers(data: Path) -> None:
    essay = texts.Essay.read(data, "niah_single_3")
    draft = texts.niah_essay(rng(), 0.5, essay, 100, uuids=True)
    key = re.search(r"uuid for (\S+) mentioned", draft.prefix).group(1)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", draft.answers[0])
    text = draft.build(20)
    first = int(re.search(r"Mr. Brown(\d+)", text).group(1))
    # A sentence has ten words: two of them, with the needle between.
    assert text + draft.prefix == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "uuid afterwards.\n"
        f"Mr. Brown{first} said that stone {first} lay in the river. "
        f"One of the special magic uuids for {key} is: {draft.answers[0]}. "
        f"Mr. Brown{first + 1} said that stone {first + 1} lay in the river.\n"
        f"What is the special magic uuid for {key} mentioned in the provided text? "
        f"The special magic uuid for {key} mentioned in the provided text is"
    )


def test_the_multikey_needles_are_four(data: Path) -> None:
    essay = texts.Essay.read(data, "niah_multikey_1")
    draft = texts.niah_essay(rng(), 0.5, essay, 400, keys=4)
    needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", draft.build(300))
    assert len({key for key, _ in needles}) == len({value for _, value in needles}) == 4
    asked = next(key for key, value in needles if value == draft.answers[0])
    assert draft.prefix == f" The special magic number for {asked} mentioned in the provided text is"
    assert draft.build(300).endswith(f"What is the special magic number for {asked} mentioned in the provided text?")


def test_the_pass_key_is_landmark_attentions() -> None:
    draft = texts.passkey(rng(), 0.5)
    assert draft.build(10) + draft.prefix == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        f"about the important information there.\n{NOISE_LINE}\nThe pass key is {draft.answers[0]}. Remember it. "
        f"{draft.answers[0]} is the pass key.\n{NOISE_LINE}\nWhat is the pass key? The pass key is"
    )


def test_the_pairs_are_lost_in_the_middles() -> None:
    draft = texts.kv_retrieval(rng(), 0.5)
    text = draft.build(3) + draft.prefix
    found = re.search(r"JSON data:\n(\{.*\})\n", text, re.DOTALL).group(1)
    pairs = list(json.loads(found).items())
    assert pairs[1][1] == draft.answers[0]
    assert text == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        f'{{"{pairs[0][0]}": "{pairs[0][1]}",\n "{pairs[1][0]}": "{pairs[1][1]}",\n "{pairs[2][0]}": "{pairs[2][1]}"}}'
        f'\n\nKey: "{pairs[1][0]}"\nCorresponding value:'
    )


def test_associative_recall_asks_for_pairs_of_the_text() -> None:
    draft = texts.mqar(rng(), DEPTHS, 50)
    head, pairs, question, queries = (draft.build(21) + draft.prefix).split("\n\n")
    assert (head, question) == ("Memorize the value of every key.", "The values of some of these keys:")
    lines = pairs.split("\n")
    assert len({line.split(": ")[0] for line in lines}) == len(lines) == 21
    assert queries.split("\n") == [lines[round(20 * depth)] for depth in draft.depths]
    assert [line.split(": ")[1] for line in queries.split("\n")] == draft.answers
    assert sorted(draft.depths) == DEPTHS


def test_the_values_of_one_key_are_rulers(data: Path) -> None:
    draft = several.multivalue(rng(), texts.Essay.read(data, "niah_multivalue"), 400)
    text = draft.build(300)
    needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", text)
    assert len(needles) == 4 and {value for _, value in needles} == {*draft.answers} and len(dict(needles)) == 1
    assert text.startswith("Some special magic numbers are hidden within the following text. Make sure to memorize it.")
    assert (text + draft.prefix).endswith(
        f"What are all the special magic numbers for {needles[0][0]} mentioned in the provided text? "
        f"The special magic numbers for {needles[0][0]} mentioned in the provided text are"
    )


def test_the_chain_of_variables_is_rulers() -> None:
    draft = several.variables(rng())
    text = draft.build(20) + draft.prefix
    example, asked = text.split("\n\nMemorize and track")
    for part, letters in ((example, 3), (asked, 5)):
        value = re.search(r"VAR [A-Z]+ = (\d{5})\n", part).group(1)
        chain = [re.search(rf"VAR ([A-Z]{{{letters}}}) = {value}\n", part).group(1)]
        for _ in range(4):
            chain.append(re.search(rf"VAR ([A-Z]{{{letters}}}) = VAR {chain[-1]}\n", part).group(1))
        assert part.index(f"VAR {chain[1]} =") > part.index(f"VAR {chain[0]} =")
        said = f"5 variables are assigned the value {value}, they are:"
        assert part.endswith(f"{said} {' '.join(chain)}" if letters == 3 else said)
    assert chain == draft.answers and asked.count(NOISE_LINE) == 20


@pytest.mark.parametrize(("length", "common", "other"), [(1000, 6, 1), (5000, 30, 3)])
def test_the_common_words_are_rulers(length: int, common: int, other: int) -> None:
    draft = several.common_words(rng(), length)
    text = draft.build(400) + draft.prefix
    _, solved, asked = text.split("Below is a numbered list of words.")
    counts = Counter(re.findall(r"\d+\. (\S+)", asked))
    assert {word for word, count in counts.items() if count == common} == {*draft.answers}
    assert sorted({*counts.values()}) == [other, common] and len(counts) == 410
    assert asked.startswith(" In these words, some appear more often than others.") and "\n1. " in asked
    assert re.search(r"in the list are: 1\. \S+ 2\. .* 10\. \S+\n$", solved)
    assert text.endswith("Answer: The top 10 words that appear most often in the list are:")
    assert draft.build(399) == draft.build(399)


def test_each_of_several_answers_counts(tokenizer: Any, model: PreTrainedModel) -> None:
    (task,) = recall_tasks(tokenizer, ["vt"], lengths=[1200], samples=2)
    first, second = task.rows
    assert len(task) == 10 and task.new_tokens >= len(tokenizer(", ".join(first.answers)).input_ids)
    seen: list[tuple[int, int]] = []
    says = {tuple(first.ids): " ".join(first.answers[1:4]), tuple(second.ids): " ".join(second.answers).lower()}
    model.generate = scripted(says, tokenizer, seen)
    assert [item.value for item in task.score(model, tokenizer, range(10), 2)] == [0, 1, 1, 1, 0, *[1.0] * 5]


@pytest.mark.parametrize("name", RECALL)
def test_lengths_are_filled_from_below(name: str, tokenizer: Any, data: Path) -> None:
    task = build(tokenizer, name, data, lengths=[1024, 1500])
    # What one more unit of filling takes: a sentence, a word, a pair.
    unit = {"mqar": "vivid-harbor: teacher\n", "kv_retrieval": f'"{"8" * 36}": "{"8" * 36}",\n '}
    slack = len(tokenizer(unit.get(name, " There and back again.")).input_ids) * (1.3 if name == "kv_retrieval" else 1)
    assert {row.length for row in task.rows} == {1024, 1500}
    for row in task.rows:
        assert row.length - slack - 2 <= len(row.ids) <= row.length


@pytest.mark.parametrize("name", [name for name in RECALL if name != "mqar"])
@pytest.mark.parametrize("twice", [False, True])
def test_the_answer_stands_once_and_at_its_depth(name: str, twice: bool, tokenizer: Any, data: Path) -> None:
    task = build(tokenizer, name + "_twice" * twice, data, lengths=[2000])
    assert [task.tags(index)["depth"] for index in range(len(task))] == DEPTHS
    for text, row in zip(prompts(task, tokenizer), task.rows, strict=True):
        half = text[: text.index(text[:40], 1)] if twice else text
        needle = f"Remember it. {row.answers[0]} is" if name == "passkey" else row.answers[0]
        assert text.count(needle) == 1 + twice
        begin = text.index("JSON data" if name == "kv_retrieval" else "afterwards." if "niah" in name else "there.")
        end = half.rindex("What is" if name != "kv_retrieval" else "Key:")
        place = (text.index(needle) - begin) / (end - begin)
        assert place == pytest.approx(row.depths[0], abs=0.25 if name == "kv_retrieval" else 0.16)


@pytest.mark.parametrize("name", RECALL)
def test_twice_is_the_same_items_with_text_and_question_repeated(name: str, tokenizer: Any, data: Path) -> None:
    once, again = recall_tasks(tokenizer, [name], data=data, lengths=[1024], samples=2, twice=True)
    assert (again.name, again.suite, again.metric) == (f"{name}_twice", "recall", "acc")
    assert [row.answers for row in once.rows] == [row.answers for row in again.rows]
    assert {once.tags(0)["twice"], again.tags(0)["twice"]} == {False, True}
    for short, long in zip(prompts(once, tokenizer), prompts(again, tokenizer), strict=True):
        body = next(short[:cut] for cut in range(len(short), 0, -1) if long.startswith(short[:cut] + "\n\n"))
        assert long == f"{body}\n\n{short}"
    assert build(tokenizer, f"{name}_twice", data, samples=2).digest == again.digest


def test_spans_hold_the_answers(tokenizer: Any) -> None:
    for task in recall_tasks(tokenizer, ["mqar"], lengths=[1024], samples=2, twice=True):
        for row in task.rows:
            found = [tokenizer.decode(row.ids[start:end]).strip() for start, end in row.spans]
            assert found == row.answers


def test_items_depend_on_the_settings_alone(tokenizer: Any, data: Path) -> None:
    def digests(**changes: Any) -> list[str]:
        options = {"lengths": [900], "samples": 1, "depths": 3, "seed": 0, **changes}
        return [task.digest for task in recall_tasks(tokenizer, list(RECALL), data=data, **options)]

    first = digests()
    assert first == digests()
    assert len(set(first)) == len(RECALL)
    for changes in ({"lengths": [1000]}, {"samples": 2}, {"depths": 2}, {"seed": 1}):
        assert not set(first) & set(digests(**changes)), changes


def test_first_items_are_spread_over_lengths_and_depths(tokenizer: Any) -> None:
    task = build(tokenizer, "niah_single_1", lengths=[900, 800], samples=3)
    assert len(task) == 30
    assert [task.tags(index)["length"] for index in range(10)] == [800] * 5 + [900] * 5
    assert len({row.answers[0] for row in task.rows}) == 30
    assert [task.tags(index)["depth"] for index in range(1)] == [0.0]
    assert build(tokenizer, "niah_single_1", depths=1).tags(0)["depth"] == 0.5


def test_a_chat_is_the_template_with_the_answer_begun(tokenizer: Any) -> None:
    class Chatty:
        chat_template = "yes"
        apply_chat_template = staticmethod(_render)

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    task = build(Chatty(), "passkey", chat=True)
    text = prompts(task, tokenizer)[0]
    assert text.startswith("User: There is an important info")
    assert text.endswith("What is the pass key?\nBot: The pass key is")
    assert len(task.rows[0].ids) <= 1024
    assert task.digest != build(tokenizer, "passkey").digest


def _render(messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
    assert not tokenize
    assert add_generation_prompt
    return f"User: {messages[0]['content']}\nBot: "


def scripted(answers: dict[tuple[int, ...], str], tokenizer: Any, seen: list[tuple[int, int]]) -> Any:
    """A `generate` that writes an answer to each prompt."""

    def generate(ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        seen.append(tuple(ids.shape))
        new = []
        for row, mask in zip(ids, attention_mask, strict=True):
            written = tokenizer(answers[tuple(row[mask.bool()].tolist())], add_special_tokens=False).input_ids
            new.append(written + [tokenizer.eos_token_id] * (200 - len(written)))
        return torch.cat([ids, torch.tensor(new)], 1)

    return generate


def test_answers_are_counted(tokenizer: Any, model: PreTrainedModel) -> None:
    task = build(tokenizer, "kv_retrieval", lengths=[900, 1200])
    written = {}
    for index, row in enumerate(task.rows):
        answer = row.answers[0]
        says = [f' "{answer}"', answer.upper(), answer[:-1], "", f"{answer[:-1]}x"][index % 5]
        written[tuple(row.ids)] = says
    seen: list[tuple[int, int]] = []
    model.generate = scripted(written, tokenizer, seen)
    model.train()
    order = [9, 0, 3, 5, 1, 2]
    assert [item.value for item in task.score(model, tokenizer, order, 2)] == [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert model.training
    # Lengths do not mix, the shorter ones come first, and nothing is read that was not asked for.
    assert [rows for rows, _ in seen] == [2, 2, 2]
    assert [width > 900 for _, width in seen] == [False, False, True]


def test_each_query_is_scored(tokenizer: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(tokenizer, "mqar", samples=2)
    assert len(task) == 10
    tags = [task.tags(item) for item in range(10)]
    assert [tag["row"] for tag in tags] == [0] * 5 + [1] * 5 and "row" not in build(tokenizer, "passkey").tags(0)
    assert task.summary([1.0] * 5 + [0.0] * 5, tags) == (0.5, pytest.approx(0.5))

    def all_right_but(model: Any, prompts: list[list[int]], last: int, pad: int) -> tuple[Tensor, Tensor]:
        likely = [[*prompt[1:], 0][-last:] for prompt in prompts]
        for row, prompt in zip(likely, prompts, strict=True):
            start = next(found for found in task.rows if found.ids == prompt).spans[3][0]
            row[start - len(prompt) - 1] += 1
        return torch.tensor(likely), torch.ones(len(prompts), dtype=torch.bool)

    monkeypatch.setattr(tasks_module, "expected", all_right_but)
    assert [item.value for item in task.score(model, tokenizer, range(10), 2)] == [1, 1, 1, 0, 1] * 2
    assert [item.value for item in task.score(model, tokenizer, [8, 2], 2)] == [0, 1]


def test_queries_are_scored_as_one_forward_pass_says(tokenizer: Any, model: PreTrainedModel) -> None:
    task = build(tokenizer, "mqar")
    row = task.rows[0]
    likely = model(torch.tensor([row.ids])).logits[0].argmax(-1).tolist()
    expected = [likely[start - 1 : end - 1] == row.ids[start:end] for start, end in row.spans]
    assert [bool(item.value) for item in task.score(model, tokenizer, range(5), 1)] == expected
    tokens, sound = running.expected(model, [row.ids], 30, 0)
    assert tokens[0].tolist() == likely[-30:]
    assert sound.all()


@pytest.mark.parametrize("converted", [False, True])
def test_pads_and_pieces_change_nothing(
    converted: bool, tokenizer: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader: Any = convert_model(model, MixerSpec(window=32, sinks=2)) if converted else model
    rows = [row.ids[:size] for row, size in zip(build(tokenizer, "passkey").rows, (40, 333, 120, 200), strict=False)]

    def written(rows: list[list[int]]) -> list[list[int]]:
        """New tokens up to the end of the text, after which a row of a batch is filled."""
        end = tokenizer.eos_token_id
        return [new[: new.index(end)] if end in new else new for new in running.written(reader, rows, 12, 0)[0]]

    alone = [written([row])[0] for row in rows]
    assert written(rows) == alone
    ends = [running.expected(reader, [row], 9, 0)[0][0].tolist() for row in rows]
    assert running.expected(reader, rows, 9, 0)[0].tolist() == ends
    monkeypatch.setattr(running, "prefill_chunk", lambda device, rows: 50)
    monkeypatch.setattr(hidden, "TOKENS", 200)
    monkeypatch.setattr(hidden, "_SHORTEST", 1)
    assert written(rows) == alone
    assert running.expected(reader, rows, 9, 0)[0].tolist() == ends


def test_batches_of_any_size_score_alike(tokenizer: Any, model: PreTrainedModel) -> None:
    for task in recall_tasks(tokenizer, ["passkey", "mqar"], lengths=[700, 800], samples=1):
        scores = [task.score(model, tokenizer, range(len(task)), batch) for batch in (1, 4)]
        assert scores[0] == scores[1]


def test_memory_that_is_full(tokenizer: Any, model: PreTrainedModel) -> None:
    task = build(tokenizer, "niah_single_1", lengths=[800, 1000, 1200])
    answers = {tuple(row.ids): row.answers[0] for row in task.rows}
    seen: list[tuple[int, int]] = []
    answer = scripted(answers, tokenizer, seen)

    def limited(tokens: int) -> Any:
        def generate(ids: Tensor, **options: Any) -> Tensor:
            if ids.numel() > tokens:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
            return answer(ids, **options)

        return generate

    model.generate = limited(2400)
    assert [item.value for item in task.score(model, tokenizer, range(15), 5)] == [1.0] * 15
    assert {rows for rows, _ in seen} == {2, 1}  # halves of five, until they fit
    model.generate = limited(1100)
    with pytest.raises(ModelError, match=r"niah_single_1: .* length 1,200 .*; 1,000 fits") as caught:
        task.score(model, tokenizer, [10], 4)
    assert "\n" not in str(caught.value)
    model.generate = limited(10)
    with pytest.raises(ModelError, match=r"length 800 .* nor any shorter"):
        task.score(model, tokenizer, range(15), 4)

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("a mistake of another kind")

    model.generate = broken
    with pytest.raises(RuntimeError, match="another kind"):
        task.score(model, tokenizer, [0], 1)


@pytest.mark.parametrize("name", ["passkey", "mqar"])
def test_logits_that_are_not_finite(name: str, tokenizer: Any, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    task = build(tokenizer, name, samples=2)
    with pytest.raises(ModelError, match=f"task {name}, item {6 if name == 'mqar' else 8}: .* not finite"):
        task.score(model, tokenizer, [7], 2)


def test_learned_positions_end(tokenizer: Any) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=960, n_embd=16, n_layer=1, n_head=2)
    gpt2 = GPT2LMHeadModel(config).eval()
    task = build(tokenizer, "passkey", lengths=[900, 1000])
    assert len(task.score(gpt2, tokenizer, [0], 1)) == 1
    with pytest.raises(ModelError, match=r"length 1,000 needs [19],?\d+ positions and the model has learned 960"):
        task.score(gpt2, tokenizer, range(10), 1)


def test_mistakes_are_told(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    def told(names: list[str], match: str, **options: Any) -> None:
        with pytest.raises(DataError, match=match) as caught:
            recall_tasks(tokenizer, names, **{"lengths": [1024], "samples": 1, **options})
        assert "\n" not in str(caught.value)

    told(["niah_singel_1"], "did you mean niah_single_1 or")
    told(["xyz"], "choose from niah_single_1")
    told(["niah_single_2"], "books/war_and_peace_pg2600.txt: give --data DIR")
    told(["niah_single_2"], "needs books/war_and_peace_pg2600.txt, which is not in", data=tmp_path)
    told(["niah_single_2"], "10,000 words, too few for a length of 20,000", data=data, lengths=[20000])
    told(["passkey"], "a length of 20 tokens does not hold the question", lengths=[20])
    told(["passkey"], "samples is 0: give 1 or more", samples=0)
    told(["passkey"], "depths is 0: give 1 or more", depths=0)
    told(["passkey"], "a length is -1: give 1 or more", lengths=[-1])
    told(["passkey"], "no lengths given", lengths=[])
    tokenizer.chat_template = None
    told(["passkey"], "no chat template", chat=True)


@pytest.mark.real
@pytest.mark.check
def test_the_teacher_finds_needles_and_a_window_does_not(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    teacher = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    task = recall_tasks(tokenizer, ["niah_single_1"], lengths=[512], samples=2)[0]
    assert len(task) == 10
    assert sum(item.value for item in task.score(teacher, tokenizer, range(10), 5)) >= 9
    mixers = [
        asdict(mixer)
        for mixer in mixers_for(MixerSpec(window=64, sinks=4), family_of(teacher.config).layers(teacher.config))
    ]
    window = window_baseline(teacher, mixers)
    assert sum(item.value for item in task.score(window, tokenizer, range(10), 5)) <= 2
