"""A folder of made-up data sets under the public ones' paths and in their formats, of a few hundred records."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from tests.made.text import ANIMALS, COLOURS, MOODS, THINGS, Cast, book, play, question, wiki_pages

ITEMS = {
    "piqa": 160, "arc_easy": 180, "arc_challenge": 140, "hellaswag": 150, "winogrande": 130, "lambada": 120,
    "wikitext2": 12,
}  # fmt: skip
"""How many items each task has here."""


def write_data(folder: Path) -> Path:
    """Writes every data set below `folder`."""
    _text(folder / "books" / "tinyshakespeare.txt", play("play", 300_000))
    _text(folder / "books" / "war_and_peace_pg2600.txt", "\ufeff" + book("book", 300_000))
    _text(folder / "wikitext2" / "wiki.test.raw", wiki_pages("test", ITEMS["wikitext2"]))
    for name, pages in (("train", 40), ("valid", 8)):
        _text(folder / "wikitext2" / f"wiki.{name}.tokens", wiki_pages(name, pages).replace("Oscar", "<unk>"))
    instructions = list(islice(alpaca("alpaca"), 900))
    _text(folder / "alpaca" / "alpaca_data.json", json.dumps(instructions, indent=4))
    for level in ("easy", "challenge"):
        _lines(folder / "arc" / f"arc_{level}.test.jsonl", _arc(f"{level} test"), ITEMS[f"arc_{level}"])
        _lines(folder / "arc" / f"arc_{level}.validation.jsonl", _arc(f"{level} validation"), 40)
    _lines(folder / "hellaswag" / "hellaswag_val.lmeval.jsonl", _hellaswag("hellaswag"), ITEMS["hellaswag"])
    _lines(folder / "piqa" / "piqa.validation.jsonl", _piqa("piqa"), ITEMS["piqa"])
    _lines(folder / "winogrande" / "winogrande_xl.validation.jsonl", _winogrande("wino"), ITEMS["winogrande"])
    _lines(folder / "lambada" / "lambada_openai.test.jsonl", _lambada("lambada"), ITEMS["lambada"])
    for split, each in (("dev", 5), ("validation", 2), ("test", 4)):
        _lines(folder / "mmlu" / f"mmlu.{split}.jsonl", _mmlu(split, each))
    return folder


def mmlu_subjects() -> list[str]:
    """The 57 subjects, as lm-eval's own files name them."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    files = sorted((Path(spec.origin).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"))
    return [file.stem.removeprefix("mmlu_") for file in files]


def alpaca(seed: str) -> Iterator[dict[str, str]]:
    """Instructions with inputs, and stories that are asked for, without end."""
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    while True:
        if draw.random() < 0.5:
            asked, choices, answer = question(draw)
            text, _, last = asked.rpartition(". ")
            yield {"instruction": last, "input": f"{text}.", "output": f"It is in the {choices[answer]}."}
        else:
            cast, thing = Cast(draw), draw.choice(THINGS)
            yield {
                "instruction": f"Tell a story about a {cast.animal} and a {thing}.",
                "input": "",
                "output": f"Here is a story about a {cast.animal} and a {thing}. {cast.sentences(draw.randint(2, 5))}",
            }


def _arc(seed: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    for number in _endless():
        text, choices, answer = question(draw)
        listed = {"text": [f"in the {choice}" for choice in choices], "label": list("ABCD")}
        yield {"id": f"Made_{seed}_{number}", "question": text, "choices": listed, "answerKey": "ABCD"[answer]}


def _hellaswag(seed: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    for number in _endless():
        cast, gold = Cast(draw), draw.randrange(4)
        name = cast.names[0]
        told = f"{cast.animal.capitalize()} games: {cast.sentences(2)} {name}"
        others = [Cast(draw) for _ in range(4)]
        choices = [
            f"took the {own['colour']} {own['thing']} home." for own in (one.own[one.names[0]] for one in others)
        ]
        choices[gold] = f"took the {cast.own[name]['colour']} {cast.own[name]['thing']} home."
        yield {"ind": number, "query": told, "ctx_raw": told, "choices": choices, "gold": gold}


def _piqa(seed: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    while True:
        thing, (colour, other), label = draw.choice(THINGS), draw.sample(COLOURS, 2), draw.randrange(2)
        goal = f"The {thing} should be {colour}. How do I make the {thing} {colour}?"
        ways = [f"Take some {colour} paint and paint the {thing}.", f"Take some {other} paint and paint the {thing}."]
        right, wrong = ways
        yield {"goal": goal, "sol1": ways[label], "sol2": wrong if label == 0 else right, "label": label}


def _winogrande(seed: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    while True:
        (one, other), mood = Cast(draw).names[:2], draw.choice(MOODS)
        animal, answer = draw.choice(ANIMALS), draw.randrange(2)
        sentence = f"{one} gave {other} a {animal} because _ was {mood} and had {'many' if answer == 0 else 'none'}."
        yield {"sentence": sentence, "option1": one, "option2": other, "answer": str(answer + 1)}


def _lambada(seed: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    while True:
        cast = Cast(draw)
        name = draw.choice(cast.names)
        own = cast.own[name]
        told = f"{name} took the {own['colour']} {own['thing']} to the {own['place']}."
        yield {"text": f"{told}\n\n{cast.sentences(4)} In the end {name} took the {own['colour']} {own['thing']}"}


def _mmlu(split: str, each: int) -> Iterator[dict[str, Any]]:
    for subject in mmlu_subjects():
        draw = random.Random(f"{subject} {split}")  # noqa: S311 - to be repeated
        for _ in range(each):
            text, choices, answer = question(draw)
            yield {"subject": subject, "question": text, "choices": choices, "answer": answer}


def _endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _lines(path: Path, records: Iterable[dict[str, Any]], count: int | None = None) -> None:
    _text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in islice(records, count)))


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
