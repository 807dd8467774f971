"""`linearize inspect`: a model's architecture, its converted layers, and the memory of both."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from linearize.checkpoint.card import ranges
from linearize.cli.console import (
    JsonOption,
    ModelArgument,
    RecipeOption,
    SetOption,
    TrustOption,
    begin,
    check_dtype,
    examples,
    print_json,
    status,
)
from linearize.cli.memory import GPUS, memory_facts, show_memory
from linearize.report.formatting import readable_bytes, readable_count

EPILOG = examples(
    "linearize inspect HuggingFaceTB/SmolLM2-135M-Instruct",
    "linearize inspect ./model.gguf --set mixer.window=256",
    "linearize inspect ./model.gguf --recurrence all",
    "linearize inspect ./model.gguf --training --gpus 4",
    "linearize inspect ./converted --json",
)


def inspect(
    model: ModelArgument,
    recipe: RecipeOption = "default",
    overrides: SetOption = None,
    recurrence: Annotated[
        str | None,
        typer.Option(
            "--recurrence",
            metavar="NAME",
            help="Short for --recipe window-gla --set mixer.recurrence=NAME; all compares every recurrence.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the caches: auto (the checkpoint's), float32, bfloat16, float16.")
    ] = "auto",
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Also show the memory of each training stage on a GPU, of the recipe train if none is named.",
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="N", min=1, help=f"GPUs that share the training, {GPUS} if left out; implies --training."
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's family and heads, what converts, and its cache against the converted model's memory.

    Reads the configuration only; no weights are loaded.
    """
    check_dtype(dtype)
    chosen = [f"mixer.recurrence={recurrence}"] if recurrence not in (None, "all") else []
    if recipe == "default" and (recurrence or training or gpus):
        recipe = "window-gla" if recurrence else "train"  # the default has neither a recurrence nor stages
    settings = begin(recipe, [*(overrides or ()), *chosen])
    from linearize.jobs import inspect as job

    if recurrence == "all":
        facts = job.inspect_recurrences(model, settings, dtype=dtype, trust_remote_code=trust_remote_code, say=status)
        if as_json:
            print_json(facts)
        else:
            _show_all(facts)
        return
    processes = gpus or GPUS
    facts, stages = job.inspect(
        model,
        settings,
        dtype=dtype,
        gpus=processes if training or gpus else None,
        chosen=bool(recurrence) or any(change.startswith("mixer") for change in overrides or ()),
        trust_remote_code=trust_remote_code,
        say=status,
    )
    if as_json:
        print_json(facts if stages is None else {**facts, "training": memory_facts(stages)})
        return
    _show(facts)
    if stages is not None:
        show_memory(settings, stages, processes)


def _show(facts: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    mixer = facts["mixers"][0]
    kept = [
        *([f"own window: layers {ranges(facts['own_window_layers'])}"] if facts["own_window_layers"] else []),
        *([f"softmax: layers {ranges(facts['softmax_layers'])}"] if facts["softmax_layers"] else []),
        *(f"softmax: key/value heads {ranges(heads)} of layer {i}" for i, heads in facts["softmax_heads"].items()),
    ]
    growth = facts["growth_bytes_per_token"]
    rows = {
        **_head(facts),
        "converts": f"{facts['converted_layers']} of {facts['layers']} layers: {_mixed(mixer, facts)}",
        **({"keeps": "; ".join(kept)} if kept else {}),
        "memory": " + ".join(f"{name} {readable_bytes(size)}" for name, size in facts["state_parts"].items())
        + f" = {readable_bytes(facts['state_bytes'])} per sequence ({_stored(facts)}"
        + (", state in float32)" if "state" in facts["state_parts"] else ")")
        + (f", and {readable_bytes(growth)} per token" if growth else ""),
        **({"kernels": _kernels(facts["kernels"])} if facts["kernels"] else {}),
    }
    for name, text in rows.items():
        out.print(f"{name:9} {text}", markup=False)
    table = _right_aligned("tokens", f"teacher's cache ({facts['dtype']})", "converted", "ratio")
    for line in facts["lengths"]:
        table.add_row(
            f"{line['tokens']:,}",
            readable_bytes(line["teacher_bytes"]),
            readable_bytes(line["converted_bytes"]),
            f"{line['ratio']:,.1f}x",
        )
    out.print(table)


def _mixed(mixer: dict[str, Any], facts: dict[str, Any]) -> str:
    exact = f"window {mixer['window']}, {mixer['sinks']} sinks, {_landmarks(facts['mixers'])}"
    if mixer["recurrence"] == "none":
        return f"{exact}no recurrence"
    return f"{mixer['recurrence']}, {exact}mix {mixer['mix']}, covers {mixer['covers']}"


def _kernels(devices: dict[str, dict[str, dict[str, str]]]) -> str:
    """The kernels of each device; parts with the same kernels and reason are grouped."""
    told = []
    for device, parts in devices.items():
        groups: dict[tuple[str, str], list[str]] = {}
        for part, decision in parts.items():
            groups.setdefault((decision["kernels"], decision["why"]), []).append(part)
        if len(groups) == 1:
            told.append(f"{device}: " + "".join(f"{kernels} ({why})" for kernels, why in groups))
        else:
            named = (f"{', '.join(names)} {kernels} ({why})" for (kernels, why), names in groups.items())
            told.append(f"{device}: " + ", ".join(named))
    return "; ".join(told)


def _show_all(facts: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    mixer = facts["mixer"]
    fitting = [row for row in facts["recurrences"] if "refused" not in row]
    rows = {
        **_head(facts),
        "mixer": f"window {mixer['window']}, {mixer['sinks']} sinks, {_landmarks([mixer])}covers {mixer['covers']}; "
        f"caches in {_stored({**facts, 'mixers': [mixer]})}, states in float32",
        "FLOPs": "per token of decoding, of all token mixers; projections and feed-forward layers are not among them",
    }
    if more := fitting[0]["growth_flops_per_token"]:
        growth = readable_bytes(fitting[0]["growth_bytes_per_token"])
        rows["keeps"] = (
            f"softmax, which adds {growth} and {readable_count(more)} FLOPs per token of context to each row"
        )
    for name, text in rows.items():
        out.print(f"{name:9} {text}", markup=False)
    table = _right_aligned("recurrence", "state", "with window and sinks", "FLOPs")
    table.columns[0].justify = "left"
    for row in fitting:
        sizes = row["state_parts"].get("state", 0), row["state_bytes"]
        table.add_row(row["name"], *map(readable_bytes, sizes), readable_count(row["flops"]))
    out.print(table)
    for row in facts["recurrences"]:
        if "refused" in row:
            out.print(f"{row['name']} does not fit: {row['refused']}", markup=False)
    table = _right_aligned("teacher at", "cache", "FLOPs")
    for line in facts["teacher"]:
        table.add_row(f"{line['tokens']:,} tokens", readable_bytes(line["bytes"]), readable_count(line["flops"]))
    out.print(table)


def _stored(facts: dict[str, Any]) -> str:
    """The dtype that keys and values are stored in."""
    kinds = {mixer.get("memory_dtype", "auto") for mixer in facts["mixers"] if mixer["window"] is not None}
    named = {"auto": facts["dtype"], "int8": "int8", "int4": "landmarks in int4, window and sinks in int8"}
    return "; ".join(named[kind] for kind in sorted(kinds or {"auto"}))


def _landmarks(mixers: list[dict[str, Any]]) -> str:
    slots = sorted({mixer.get("landmarks", 0) for mixer in mixers if mixer["window"] is not None})
    if slots == [0]:
        return ""
    return f"{slots[0]:,} to {slots[-1]:,} landmarks, " if len(slots) > 1 else f"{slots[0]:,} landmarks, "


def _head(facts: dict[str, Any]) -> dict[str, str]:
    group = facts["query_heads"] // facts["key_value_heads"]
    return {
        "model": facts["model"] + (" (converted)" if facts["converted"] else ""),
        "family": f"{facts['family']} ({facts['architecture']}), {facts['layers']} layers",
        "heads": f"{facts['query_heads']} query, {facts['key_value_heads']} key/value ({group} queries share a state), "
        f"width {facts['key_width']}",
        **({"rotary": "; ".join(map(_scaling, facts["rotary_scaling"]))} if facts["rotary_scaling"] else {}),
        **({"positions": "; ".join(facts["positions"])} if facts["positions"] else {}),
    }


def _scaling(found: dict[str, Any]) -> str:
    """For example `llama3 by 32: from 8,192 to 131,072 tokens`."""
    by = f" by {found['factor']:g}" if found["factor"] not in (None, 1) else ""
    before = found["before"] if found["before"] != found["after"] else None
    lengths = [f"{word} {n:,}" for word, n in (("from", before), ("to", found["after"])) if n]
    where = "" if found["layers"] == "all" else f" ({found['layers']})"
    return f"{found['type']}{by}" + (f": {' '.join(lengths)} tokens" if lengths else "") + where


def _right_aligned(*names: str) -> Table:
    table = Table(*names)
    for column in table.columns:
        column.justify = "right"
    return table
