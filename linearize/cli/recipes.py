"""`linearize recipes`: list, show, copy and check recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli.console import JsonOption, SetOption, examples, print_json, recipe_names, status
from linearize.cli.libraries import quiet_libraries
from linearize.errors import OutputError, RecipeError
from linearize.report.formatting import readable_bytes, readable_count

if TYPE_CHECKING:
    from linearize.recipe import Recipe, Stage

app = typer.Typer(
    help="List, show, copy and check recipes.",
    no_args_is_help=True,
    epilog=examples(
        "linearize recipes ls",
        "linearize recipes show liger-gla",
        "linearize recipes ls --model ./model.gguf",
        "linearize recipes cp default mine.yaml",
        "linearize recipes check mine.yaml --set mixer.window=128",
    ),
)

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A shipped recipe, or a recipe file.", autocompletion=recipe_names),
]


@app.command("ls", epilog=examples("linearize recipes ls", "linearize recipes ls --model ./model.gguf --json"))
def list_recipes(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Show each recipe's cost for this model: bytes of a sequence's memory, and FLOPs per token.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, first those to begin with, and what was measured with them."""
    from linearize.recipe import shipped_recipes

    rows: list[dict[str, Any]] = [
        {"name": one.name, "description": one.description, "measured": one.measured} for one in shipped_recipes()
    ]
    if model is not None:
        costs = _costs(model, [row["name"] for row in rows])
        rows = [{**row, **cost} for row, cost in zip(rows, costs, strict=True)]
    if as_json:
        print_json(rows)
        return
    heads = ("RECIPE", *(() if model is None else ("MEMORY OF A SEQUENCE", "ATTENTION PER TOKEN")))
    lines = [(row["name"], *(() if model is None else _cost_words(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    described = [(heads, "DESCRIPTION", "")]
    described += [(line, row["description"], row["measured"]) for line, row in zip(lines, rows, strict=True)]
    for line, description, measured in described:
        print("  ".join((*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), description)))
        if measured:
            print(" " * (sum(widths) + 2 * len(widths)) + measured)


def _costs(model: str, names: list[str]) -> list[dict[str, Any]]:
    """The costs of each recipe's mixer in `model`, from the model's configuration alone."""
    quiet_libraries()
    from linearize.conversion.inspection import compare_mixers
    from linearize.recipe import load_recipe
    from linearize.sources.source import find_source

    _, costs = compare_mixers(find_source(model), {name: load_recipe(name).mixer for name in names})
    return costs


def _cost_words(row: dict[str, Any]) -> tuple[str, str]:
    if "refused" in row:
        return "does not fit:", row["refused"]
    more = row["growth_flops_per_token"]
    growth = row["growth_bytes_per_token"]
    return (
        readable_bytes(row["state_bytes"]) + (f" + {readable_bytes(growth)} x context" if growth else ""),
        f"{readable_count(row['flops'])}{f' + {readable_count(more)} x context' if more else ''} FLOPs",
    )


@app.command(
    "show", epilog=examples("linearize recipes show liger-gla", "linearize recipes show default --set mixer.window=128")
)
def show(name: NameArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Print a recipe with all defaults."""
    from linearize.recipe import dump_recipe, load_recipe

    recipe = load_recipe(name, overrides or ())
    if as_json:
        print_json(recipe.model_dump(mode="json"))
    else:
        sys.stdout.write(dump_recipe(recipe))


@app.command("cp", epilog=examples("linearize recipes cp default mine.yaml", "linearize recipes cp kda recipes/"))
def copy(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder; NAME.yaml here if left out.")
    ] = None,
) -> None:
    """Copy a recipe, comments included, to edit it."""
    from linearize.recipe import recipe_path
    from linearize.runtime.files import staged_file

    source = recipe_path(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if not target.parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent}; make it first")
    with staged_file(target) as staging:
        if target.exists():
            raise OutputError(f"{target}: exists already; name another file, or remove it first")
        staging.write_bytes(source.read_bytes())
    print(target)
    status(f"copied {source.stem}; check your changes with 'linearize recipes check {target}'")


@app.command(
    "schema", epilog=examples("linearize recipes schema > recipe.schema.json", "linearize recipes schema | less")
)
def schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks keys.

    With the YAML language server, begin a recipe with `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from linearize.recipe import Recipe

    found = Recipe.model_json_schema()
    base = {"type": "string", "description": "A recipe, by name or file, whose keys hold where this one has none."}
    found["properties"] = {"base": base, **found["properties"]}
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **found})


@app.command(
    "check",
    epilog=examples("linearize recipes check mine.yaml", "linearize recipes check default --set mixer.window=128"),
)
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe file, or a shipped recipe.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe and print a summary; exits with 1 and the line and key of every error."""
    from linearize.recipe import load_recipe

    try:
        recipe = load_recipe(file, overrides or ())
    except RecipeError as error:
        if as_json:
            print_json({"recipe": file, "ok": False, "errors": error.every or [str(error)]})
            raise typer.Exit(1) from None
        *others, last = error.every or [str(error)]
        for line in others:
            status(f"error: {line}")
        raise RecipeError(last) from None
    summary = _summary(recipe)
    if as_json:
        print_json({"recipe": file, "ok": True, "summary": summary})
    else:
        print(f"ok: {file}: {summary}")


def _summary(recipe: Recipe) -> str:
    mixer, lora = recipe.mixer, recipe.lora
    alone = mixer.recurrence == "none"
    return "; ".join(
        (
            f"model {recipe.model or 'to be named'}",
            f"window {mixer.window} + {mixer.sinks} sinks"
            f"{f' + {mixer.landmarks} landmarks' if mixer.landmarks else ''}, "
            f"{'no recurrence' if alone else f'{mixer.recurrence}, mix {mixer.mix}, covers {mixer.covers}'}"
            f"{f', memory in {mixer.memory_dtype}' if mixer.memory_dtype != 'auto' else ''}",
            *(f"stage {index}: {_stage_summary(stage)}" for index, stage in enumerate(recipe.stages)),
            f"lora rank {lora.rank} on {', '.join(lora.targets)}" if lora else "no lora",
            f"seed {recipe.seed}",
        )
    )


def _stage_summary(stage: Stage) -> str:
    objective = " + ".join(
        f"{weight:g} {name}" if len(stage.weights) > 1 else name for name, weight in stage.weights.items()
    )
    tokens = f"{stage.data.tokens} tokens" if stage.data.tokens else "all tokens"
    mixed = sum(source.weight for source in stage.data.mix)
    text = " + ".join(f"{s.weight / mixed:.0%} {s.source}" for s in stage.data.mix) or stage.data.source
    return f"{objective} on {text}, {tokens} x {stage.epochs:g}, length {stage.length}, lr {stage.lr:g}"
