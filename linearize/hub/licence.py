"""Find a base model's licence, which derived models inherit, in its card or in a GGUF file's keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from linearize.sources.source import Source

_KEYS = ("license", "license_name", "license_link")


def licence_of(sources: Iterable[Source]) -> dict[str, str]:
    """The keys `license`, `license_name` and `license_link` of the first model that has any; empty if none has, or none
    can be reached."""
    for source in sources:
        found = _of_gguf(Path(source.reference)) if source.kind == "gguf" else _of_card(source)
        if found:
            return found
    return {}


def _of_card(source: Source) -> dict[str, str]:
    try:
        matter = _of_hub(source.reference) if source.kind == "hub" else front_matter(_text(Path(source.reference)))
    except Exception:  # no card, no network or no access: unknown
        return {}
    return {key: matter[key] for key in _KEYS if isinstance(matter.get(key), str)}


def _of_hub(reference: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    kept = try_to_load_from_cache(reference, "README.md")
    if isinstance(kept, str):
        return front_matter(Path(kept).read_text(encoding="utf-8"))
    card = HfApi().model_info(reference, timeout=10).card_data
    return {} if card is None else {key: card.get(key) for key in _KEYS}


def _text(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, Any]:
    """Parse the YAML front matter of a model card."""
    if not card.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(card[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _of_gguf(path: Path) -> dict[str, str]:
    from linearize.sources.gguf import read_head

    try:
        values = read_head(path).values
    except (OSError, ModelError):  # the file may be missing or damaged
        return {}
    named = {key: values.get(f"general.{key.replace('_', '.')}") for key in _KEYS}
    return {key: value for key, value in named.items() if isinstance(value, str)}
