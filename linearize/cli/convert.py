"""`linearize convert`: a pretrained model in, a converted checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.console import (
    JsonOption,
    ModelArgument,
    OverwriteOption,
    RecipeOption,
    SetOption,
    TrustOption,
    begin,
    examples,
    memory_words,
    parse_size,
    print_json,
    status,
)
from linearize.runtime.interruption import Interrupted

if TYPE_CHECKING:
    from linearize.recipe import Recipe

EPILOG = examples(
    "linearize convert HuggingFaceTB/SmolLM2-135M-Instruct -o smol",
    "linearize convert ./model.gguf -o out --recipe small",
    "linearize convert ./model -o out --set mixer.landmarks=1024",
    "linearize convert meta-llama/Llama-3.2-1B -o llama-gla --recipe liger-gla --dry-run",
)


def convert(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")],
    recipe: RecipeOption = "default",
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with sizes, and stop.")] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Maximum size of a file of weights, such as 5GB.")
    ] = "5GB",
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, help="Files written in parallel; each takes memory for a tensor or block."),
    ] = 1,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a pretrained model by a recipe's mixer section.

    The default recipe keeps a window, sinks, and the tokens that it expects to be needed, chosen by a score that is
    fitted in minutes to text that comes with the package; nothing is trained. `--recipe small` takes less than half of
    the memory, `--recipe train` fits a recurrence that `linearize finetune train` trains on. `mixer.keep.budget`
    chooses the layers that keep softmax.

    A recipe that measures nothing on the whole model copies weights in safetensors files one tensor at a time, and
    calibrates them block by block if `calibrate.source` is not `self`, so memory does not grow with the model; --set
    dtype=bfloat16 casts them during the copy.
    """
    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    settings = begin(recipe, overrides, output, overwrite=overwrite)
    if dry_run:
        from linearize.jobs.inspect import plan_convert

        source, facts = plan_convert(
            model, output, settings, overwrite=overwrite, trust_remote_code=trust_remote_code, say=status
        )
        if as_json:
            print_json({"output": str(output), "written": False, **facts})
        else:
            print(
                f"would convert {facts['converted_layers']} of {facts['layers']} layers of {source.name} and write "
                f"{output}; memory per sequence: {memory_words(facts['state_bytes'], facts['growth_bytes_per_token'])}"
            )
        return
    from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
    from linearize.conversion.swap import converted_layers
    from linearize.jobs.convert import run_convert

    started = time.monotonic()
    try:
        start = run_convert(
            model,
            output,
            settings,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            shard_bytes=shard_bytes,
            workers=workers,
            say=status,
        )
    except (KeyboardInterrupt, Interrupted):
        status(f"interrupted: {output} was not written; the same command begins anew")
        raise
    converted = start.model
    facts = {
        "output": str(output),
        "written": True,
        "layers": converted.config.num_hidden_layers,
        "converted_layers": converted_layers(converted),
        "parameters": converted.num_parameters(),
        "state_bytes": state_nbytes(converted),
        "growth_bytes_per_token": growth_nbytes(converted),
        **start.record,
        "seconds": round(time.monotonic() - started, 1),
    }
    if as_json:
        print_json(facts)
        return
    print(output)
    status(
        f"converted {facts['converted_layers']} of {facts['layers']} layers in {facts['seconds']} s; memory per "
        f"sequence: {memory_words(facts['state_bytes'], facts['growth_bytes_per_token'])}\n"
        f"next: {_next(settings, output, chats=start.chats)}"
    )


def _next(recipe: Recipe, output: Path, *, chats: bool) -> str:
    """The command to go on with: training if the recipe has stages, otherwise a conversation or, without a chat
    template, a text to continue."""
    if recipe.stages:
        return f"linearize finetune train -o {output}-tuned --set model={output}"
    return f"linearize chat {output}" if chats else f'linearize generate {output} "Once upon a time"'
