"""One rotary table for texts of every length.

transformers selects some rotary frequencies by the longest position of a call: LongRoPE's short or long factors
(arXiv 2402.13753), and the base of dynamic NTK scaling. Cached keys keep the table of their own call, so a text read in
pieces gives other outputs than the same text read at once. A converted model has one table: the one for the longest
context in its configuration, which vLLM uses too.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from linearize.families.base import head_width

if TYPE_CHECKING:
    from torch import nn


def settle_rotary(config: Any) -> list[str]:
    """Replace tables that depend on the length of a text by the one for the longest context, in `config` itself.

    Returns:
        one sentence per kind of replaced table; empty if no table depends on the length.
    """
    told: list[str] = []
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return told
    if any(isinstance(section, dict) for section in found.values()):  # one table per type of layer
        config.rope_parameters = {
            kind: _settled(section, config, told) if isinstance(section, dict) else section
            for kind, section in found.items()
        }
    else:
        config.rope_parameters = _settled(found, config, told)
    return list(dict.fromkeys(told))


def rotary_notes(config: Any) -> list[str]:
    """The sentences of `settle_rotary` for a pretrained model; `config` does not change."""
    return settle_rotary(copy.deepcopy(config))


def _settled(section: dict[str, Any], config: Any, told: list[str]) -> dict[str, Any]:
    kind = str(section.get("rope_type", section.get("type", "default")))
    most = int(config.max_position_embeddings)
    if kind == "longrope" and section["short_factor"] != section["long_factor"]:
        trained = getattr(config, "original_max_position_embeddings", None)
        trained = int(trained or section.get("original_max_position_embeddings") or most)
        taken, other = ("long", "short") if most > trained else ("short", "long")
        where = f"up to {trained:,}" if most > trained else f"more than {trained:,}"
        told.append(
            f"LongRoPE: converted, texts of all lengths are read with the {taken} factors; the pretrained model takes "
            f"the {other} ones for texts of {where} tokens, so there the two differ before training"
        )
        return {**section, f"{other}_factor": list(section[f"{taken}_factor"])}
    if "dynamic" in kind:
        factor, theta = float(section["factor"]), float(section["rope_theta"])
        width = int(head_width(config) * section.get("partial_rotary_factor", 1.0))
        length = max(most, int(factor * most))
        # The formula of `_compute_dynamic_ntk_parameters` in transformers, for a text of `length` tokens.
        theta *= (factor * length / most - (factor - 1)) ** (width / (width - 2))
        told.append(
            f"dynamic NTK: converted, texts of all lengths are read with the base for {length:,} tokens; the "
            "pretrained model's changes with the length, so the two differ on other texts before training"
        )
        kept = {name: value for name, value in section.items() if name not in ("factor", "type")}
        return {**kept, "rope_type": "default", "rope_theta": theta}
    return section


def renew_rotary(model: nn.Module, config: Any) -> None:
    """Replace the rotary embeddings of `model` by new ones from `config`, on the same device."""
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if hasattr(module, "rope_type"):
                device = next(module.buffers()).device
                setattr(owner, name, type(module)(config).to(device))


__all__ = ["renew_rotary", "rotary_notes", "settle_rotary"]
