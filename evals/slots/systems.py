"""The compared systems, at the bytes of a recipe's memory: the recipe, a window, the pretrained model, presses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evals.slots.presses import PRESSES, Presses
from evals.slots.texts import TAIL, Text
from linearize.conversion.swap import mixers_for, window_baseline, window_sections
from linearize.evaluation.baselines import equal_bytes, memory_bytes
from linearize.evaluation.tasks.reading import losses
from linearize.evaluation.tasks.recall.running import written
from linearize.evaluation.tasks.recall.tasks import pad_of
from linearize.families import family_of
from linearize.jobs.convert import convert
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_config, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TEACHER, WINDOW = "teacher", "window"
STORED = torch.bfloat16
"""The dtype in which keys and values are counted, whatever a run computes in: caches are kept in 16 bits."""


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        kind: `teacher`, `window`, the name of a press, or that of the recipe.
        slots: the landmarks of the recipe whose bytes it has; 0 for the teacher.
        nbytes: of one sequence's memory; 0 for the teacher, whose cache grows.
        tokens: the tokens of the teacher's cache that take as many bytes; of `window` its width.
        ours: the recipe whose bytes it has; None for the teacher.
    """

    kind: str
    slots: int
    nbytes: int
    tokens: int
    ours: Ours | None = None

    @property
    def name(self) -> str:
        return self.kind if self.kind == TEACHER else f"{self.kind}@{self.slots}"


@dataclass(frozen=True)
class Ours:
    """A recipe or its file, with `--set` changes; its name has both."""

    recipe: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join([self.recipe.rsplit("/", 1)[-1].removesuffix(".yaml"), *self.changes])

    def at(self, slots: int) -> list[str]:
        return [*self.changes, f"mixer.landmarks={slots}"]


ABLATIONS = {
    "no sharing": ("mixer.landmarks_by=null",),
    "no sharing, no learned score": ("mixer.landmarks_by=null", "mixer.landmark_score=novelty"),
    "8 bits": ("mixer.memory_dtype=int8",),
    "16 bits": ("mixer.memory_dtype=auto",),
}
"""An ingredient of the recipe `default` -> what takes it away."""


def ablations_of(model: Path, ours: Ours, slots: int) -> list[System]:
    """The recipe without one of its ingredients, each with as many landmarks as its bytes have room for, if any."""
    config = load_config(find_source(str(model))).get_text_config()
    (most,) = (system.nbytes for system in systems_of(model, ours, [slots]) if system.kind == ours.name)
    found = []
    for changes in ABLATIONS.values():
        other = Ours(ours.recipe, (*ours.changes, *changes))
        some, more = (_nbytes(config, _sections(config, other, count)[0]) for count in (slots, 2 * slots))
        room = slots + (most - some) * slots // (more - some)
        if room > 0:
            found += [system for system in systems_of(model, other, [room]) if system.kind == other.name]
    return found


def _nbytes(config: Any, sections: list[Any]) -> int:
    return sum(constant for constant, _ in memory_bytes(config, sections, STORED))


def systems_of(model: Path, ours: Ours, slots: Sequence[int]) -> list[System]:
    """All systems, the teacher first, then by size. Bytes are those of equal shares: sharing out adds none."""
    config = load_config(find_source(str(model))).get_text_config()
    per_token = sum(grown for _, grown in memory_bytes(config, [], STORED))
    found = [System(TEACHER, 0, 0, 0)]
    for count in slots:
        sections = _sections(config, ours, count)
        nbytes, window = (_nbytes(config, one) for one in sections)
        tokens = nbytes // per_token
        found.append(System(ours.name, count, nbytes, tokens, ours))
        found.append(System(WINDOW, count, window, sections[1][0]["window"], ours))
        found += [System(name, count, tokens * per_token, tokens, ours) for name in PRESSES]
    return found


def _sections(config: Any, ours: Ours, slots: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """The mixers of the recipe, and those of the window of equal bytes, which is stored as the recipe's own is."""
    spec = load_recipe(ours.recipe, [*ours.at(slots), "mixer.landmarks_by=null"]).mixer
    own = mixers_for(spec, family_of(config).layers(config))
    return own, window_sections(equal_bytes(config, own, STORED))


def load(system: System, model: Path, work: Path, dtype: str, say: Any) -> Any:
    """A model that reads text by itself: the teacher, a window, or the recipe's, converted once into `work`."""
    source = find_source(str(model))
    ours = system.ours
    if ours is None:
        return load_model(source, dtype=dtype).eval()
    if system.kind == WINDOW:
        teacher = load_model(source, dtype=dtype)
        return window_baseline(teacher, _sections(teacher.config, ours, system.slots)[1]).eval()
    folder = work / system.name.replace("/", "_")
    if not (folder / "linearize.json").is_file():
        convert(model, folder, ours.recipe, overrides=[*ours.at(system.slots), f"dtype={dtype}"], say=say)
    return load_model(find_source(str(folder)), dtype=dtype).eval()


class Score(NamedTuple):
    """The score of a system on a text.

    Attributes:
        value: the share of the answers that it writes, or the loss of the last `TAIL` tokens in nats per token.
        whole: the loss of all tokens from the second on; None where answers count, and of a press, which cuts the cache
            at one place.
    """

    value: float
    whole: float | None = None


def score(model: Any, tokenizer: Any, text: Text) -> Score:
    """The score of a model that reads text by itself."""
    if not text.answers:
        with torch.inference_mode():
            lost = torch.cat(list(losses(model, torch.tensor([text.ids]))), 1)[0]
        return Score(float(lost[-TAIL:].mean()), float(lost.mean()))

    def done(_: int, new: list[int]) -> bool:
        return found(tokenizer, new, text.answers) == 1

    new, sound = written(model, [text.ids], text.new_tokens, pad_of(tokenizer), done)
    if not bool(sound.all()):
        raise ValueError("logits that are not finite")
    return Score(found(tokenizer, new[0], text.answers))


def ask(presses: Presses, tokenizer: Any, system: System, text: Text) -> Score:
    """The score of a press."""
    press = None if system.kind == TEACHER else system.kind
    if not text.answers:
        return Score(float(presses.ask(press, system.tokens, text.context, text.question, targets=True)["loss"]))
    reply = presses.ask(press, system.tokens, text.context, text.question, new_tokens=text.new_tokens)
    return Score(found(tokenizer, reply["ids"], text.answers))


def found(tokenizer: Any, new: list[int], answers: Sequence[str]) -> float:
    """RULER's `string_match_all`."""
    said = tokenizer.decode(new, skip_special_tokens=True).lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)
