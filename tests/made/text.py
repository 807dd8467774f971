"""Deterministic English-like text, in which what a document says early comes again late.

Each document has a cast: a few of all names, things, colours and places. Its sentences draw from these, so a model that
remembers the words of a whole document has a lower loss than one that sees the last few alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Lily", "Max",
    "Mia", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tim", "Tom", "Vera", "Will",
)  # fmt: skip
THINGS = (
    "apple", "ball", "basket", "bell", "boat", "book", "bottle", "box", "bread", "broom", "button", "cake", "candle",
    "chair", "clock", "coat", "cup", "drum", "flag", "flower", "hammer", "hat", "kite", "ladder", "lamp", "letter",
    "map", "mirror", "paper", "pear", "pencil", "plate", "ring", "rope", "scarf", "shell", "shoe", "spoon", "stone",
    "stool", "table", "wheel",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "silver", "white", "yellow")
PLACES = (
    "barn", "beach", "bridge", "cave", "church", "farm", "field", "forest", "garden", "harbour", "hill", "house",
    "island", "kitchen", "lake", "market", "mill", "park", "river", "school", "shop", "station", "street", "tower",
    "town", "valley", "village", "well",
)  # fmt: skip
ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "duck",
    "fish",
    "fox",
    "goat",
    "horse",
    "mouse",
    "owl",
    "rabbit",
    "sheep",
)
MOODS = ("angry", "cold", "glad", "happy", "hungry", "kind", "proud", "quiet", "sad", "sleepy", "tired", "young")

_ABOUT = (
    "{name} took the {colour} {thing} to the {place}.",
    "{name} went to the {place} with the {colour} {thing}.",
    "The {colour} {thing} of {name} was in the {place}.",
    "{name} looked for the {colour} {thing} and found it in the {place}.",
    'And {name} said, "My {colour} {thing} is in the {place}."',
    "In the {place} {name} had the {colour} {thing}.",
    "{name} was {mood} and kept the {colour} {thing} near the {place}.",
)
_BETWEEN = (
    "The {animal} saw {name} and ran away.",
    "Then a {mood} {animal} came to the door.",
    "It was a {mood} day, and the {animal} slept.",
    "{name} was {mood} and sat down.",
    "{name} and {other} played with the {animal}.",
    '"Why are you so {mood}?" {other} asked {name}.',
    "They all laughed and went home.",
    "{name} gave the {animal} some bread and water.",
)


class Cast:
    """The words that one document draws from, and what belongs to each person."""

    def __init__(self, draw: random.Random, people: int = 3) -> None:
        self.draw, self.names = draw, draw.sample(NAMES, people)
        self.animal = draw.choice(ANIMALS)
        self.words = {
            "colour": draw.sample(COLOURS, 3),
            "thing": draw.sample(THINGS, 7),
            "place": draw.sample(PLACES, 6),
            "mood": draw.sample(MOODS, 4),
        }
        self.own = {name: self._some() for name in self.names}

    def _some(self) -> dict[str, str]:
        return {kind: self.draw.choice(words) for kind, words in self.words.items()}

    def sentence(self) -> str:
        name, other = self.draw.sample(self.names, 2)
        wording = self.draw.choice(_ABOUT if self.draw.random() < 0.7 else _BETWEEN)
        return wording.format(name=name, other=other, animal=self.animal, **self._some())

    def sentences(self, count: int) -> str:
        return " ".join(self.sentence() for _ in range(count))


def stories(seed: str, sentences: tuple[int, int] = (6, 30)) -> Iterator[str]:
    """Stories without end."""
    draw = random.Random(seed)  # noqa: S311 - to be repeated
    while True:
        cast = Cast(draw)
        first = (
            f"Once upon a time there was a {cast.animal} who lived with {cast.names[0]} in the {draw.choice(PLACES)}."
        )
        yield f"{first} {cast.sentences(draw.randint(*sentences))}"


def play(seed: str, characters: int) -> str:
    """Scenes of people who speak in turn, at least so many characters long."""
    draw, scenes, size = random.Random(seed), [], 0  # noqa: S311 - to be repeated
    while size < characters:
        cast = Cast(draw, 4)
        turns = [f"{draw.choice(cast.names)}:\n{cast.sentences(draw.randint(1, 3))}" for _ in range(40)]
        scenes.append("\n\n".join(turns))
        size += len(scenes[-1]) + 2
    return "\n\n".join(scenes) + "\n"


def book(seed: str, characters: int) -> str:
    """Chapters of paragraphs, lines broken as in a printed book, at least so many characters long."""
    draw, chapters, size = random.Random(seed), [], 0  # noqa: S311 - to be repeated
    while size < characters:
        cast = Cast(draw, 4)
        paragraphs = []
        for _ in range(8):
            lines, line = [], ""
            for word in cast.sentences(draw.randint(3, 8)).split():
                if len(line) + len(word) > 70:
                    lines.append(line)
                    line = ""
                line = f"{line} {word}".strip()
            paragraphs.append("\n".join([*lines, line]))
        chapters.append(f"CHAPTER {len(chapters) + 1}\n\n" + "\n\n".join(paragraphs))
        size += len(chapters[-1]) + 2
    return "\n\n".join(chapters) + "\n"


def wiki_pages(seed: str, pages: int, sections: int = 3) -> str:
    """Pages as WikiText has them: titles between signs of equality, and punctuation that stands alone."""
    draw, lines = random.Random(seed), [" "]  # noqa: S311 - to be repeated
    for page in range(pages):
        cast = Cast(draw)
        lines += [f" = The {cast.animal.capitalize()} of {cast.names[0]} {page} = ", " "]
        for _ in range(sections):
            lines += [f" = = In the {draw.choice(PLACES)} = = ", " "]
            for _ in range(3):
                text = cast.sentences(draw.randint(4, 9)).replace('"', ' " ').replace("  ", " ")
                lines.append(" " + text.replace(".", " .").replace(",", " ,").replace("?", " ?") + " ")
            lines.append(" ")
    return "\n".join(lines) + "\n"


def question(draw: random.Random) -> tuple[str, list[str], int]:
    """A short text that ends in a question, four answers, and which of them is right."""
    cast = Cast(draw)
    name = draw.choice(cast.names)
    choices = draw.sample(PLACES, 4)
    answer = draw.randrange(4)
    cast.own[name]["place"] = choices[answer]
    text = f"{cast.sentences(2)} {name} left the {cast.own[name]['thing']} in the {choices[answer]}."
    return f"{text} Where is the {cast.own[name]['thing']} of {name}?", choices, answer
