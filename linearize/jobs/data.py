"""`linearize data`: the training rows of a recipe's stages as text, without loading a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.checkpoint.provenance import provenance_of
from linearize.data.load import preview_data, reserved_tokens
from linearize.data.rows import NO_LOSS
from linearize.errors import DataError, RecipeError
from linearize.jobs.checks import model_of
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from linearize.data.rows import Rows


def preview_stages(
    recipe: str,
    overrides: Sequence[str],
    *,
    rows: int,
    stage: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """The first `rows` training rows of each source of each stage, or of one stage, counted from 1.

    Returns:
        for each stage its number, objective, length and rows. A row has its ids, labels, positions and segments. A
        segment is the part of one document, cut into pieces of text with or without loss.

    Raises:
        RecipeError: the recipe names no model, or has no such stage.
        DataError: a source cannot be read, or a model would have to generate all of the text first.
    """
    settings = load_recipe(recipe, overrides)
    reference = model_of(settings)
    count = len(settings.stages)
    if not count or (stage or 1) > count:
        raise RecipeError(f"{recipe}: has {count} stages, so there is no stage {stage or 1} to show")
    source = find_source(reference, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source)
    earlier = provenance_of(source).get("stages") if source.is_converted else None
    reserved = reserved_tokens(settings.stages)
    shown = []
    for number, one in enumerate(settings.stages):
        if stage not in (None, number + 1):
            continue
        found = preview_data(
            one.data,
            tokenizer=tokenizer,
            length=one.length,
            seed=settings.seed,
            rows=rows,
            draw=number + (len(earlier) if isinstance(earlier, list) else 0),
            reserved=reserved,
            progress=lambda line, number=number: say(f"stage {number + 1}: {line}"),  # type: ignore[misc]
        )
        rendered = [
            {"source": name, "row": place + 1, **_row(made[place : place + 1], tokenizer)}
            for name, made in found
            for place in range(len(made))
        ]
        objective = " + ".join(one.weights)
        shown.append({"stage": number + 1, "objective": objective, "length": one.length, "rows": rendered})
    if not any(one["rows"] for one in shown):
        raise DataError(
            f"{recipe}: all its text is written by a model when training begins, so there is no row to show; name a "
            "file or a data set: --set stages.0.data.source=FILE"
        )
    return shown


def _row(row: Rows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids, labels, positions = (tensor[0].tolist() for tensor in (row.input_ids, row.labels, row.position_ids))
    starts = [place for place, position in enumerate(positions) if position == 0]
    segments = [
        {"start": start, "tokens": end - start, "pieces": _pieces(ids[start:end], labels[start:end], tokenizer)}
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    return {
        "tokens_with_loss": sum(label != NO_LOSS for label in labels),
        "segments": segments,
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
    }


def _pieces(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Runs of tokens with or without loss, each with its text."""
    borders = [n for n in range(1, len(ids)) if (labels[n] == NO_LOSS) != (labels[n - 1] == NO_LOSS)]
    pieces, before = [], ""
    for start, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        # Decode from the start, because some tokenizers drop a space at the beginning of a text.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append({"text": str(text)[len(before) :], "loss": labels[start] != NO_LOSS, "tokens": end - start})
        before = str(text)
    return pieces
