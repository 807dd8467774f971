"""`linearize inspect`: what a model is, what would be converted, and what that does to its memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from linearize.cli.console import (
    JsonOption,
    ModelArgument,
    RecipeOption,
    SetOption,
    TrustOption,
    check_dtype,
    examples,
    print_json,
    readable_bytes,
)
from linearize.cli.libraries import quiet_libraries
from linearize.hub.card import ranges

EPILOG = examples(
    "linearize inspect HuggingFaceTB/SmolLM2-135M-Instruct",
    "linearize inspect ./model.gguf --set mixer.window=256",
    "linearize inspect ./converted --json",
)


def inspect(
    model: ModelArgument,
    recipe: RecipeOption = "default",
    overrides: SetOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the caches: auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's family and heads, what converts, and its cache against the converted model's memory.

    Reads the configuration only; no weights are loaded.
    """
    check_dtype(dtype)
    quiet_libraries()
    from linearize.conversion.inspection import inspect_model
    from linearize.conversion.source import DTYPES, find_source
    from linearize.recipe import load_recipe

    spec = load_recipe(recipe, overrides or ()).mixer
    source = find_source(model, trust_remote_code=trust_remote_code)
    facts = inspect_model(source, spec, dtype=DTYPES.get(dtype))
    if as_json:
        print_json(facts)
        return
    _show(facts)


def _show(facts: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    mixer = facts["mixers"][0]
    group = facts["query_heads"] // facts["key_value_heads"]
    kept = [
        *([f"own window: layers {ranges(facts['own_window_layers'])}"] if facts["own_window_layers"] else []),
        *([f"softmax: layers {ranges(facts['softmax_layers'])}"] if facts["softmax_layers"] else []),
        *(f"softmax: key/value heads {ranges(heads)} of layer {i}" for i, heads in facts["softmax_heads"].items()),
    ]
    growth = facts["growth_bytes_per_token"]
    rows = {
        "model": facts["model"] + (" (converted)" if facts["converted"] else ""),
        "family": f"{facts['family']} ({facts['architecture']}), {facts['layers']} layers",
        "heads": f"{facts['query_heads']} query, {facts['key_value_heads']} key/value ({group} queries share a state), "
        f"width {facts['key_width']}",
        "converts": f"{facts['converted_layers']} of {facts['layers']} layers: {mixer['recurrence']}, window "
        f"{mixer['window']}, {mixer['sinks']} sinks, mix {mixer['mix']}, covers {mixer['covers']}",
        **({"keeps": "; ".join(kept)} if kept else {}),
        "memory": " + ".join(f"{name} {readable_bytes(size)}" for name, size in facts["state_parts"].items())
        + f" = {readable_bytes(facts['state_bytes'])} per sequence ({facts['dtype']}, state in float32)"
        + (f", and {readable_bytes(growth)} per token" if growth else ""),
    }
    for name, text in rows.items():
        out.print(f"{name:9} {text}", markup=False)
    table = Table("tokens", "teacher's cache", "converted", "ratio")
    for column in table.columns:
        column.justify = "right"
    for line in facts["lengths"]:
        table.add_row(
            f"{line['tokens']:,}",
            readable_bytes(line["teacher_bytes"]),
            readable_bytes(line["converted_bytes"]),
            f"{line['ratio']:,.1f}x",
        )
    out.print(table)
