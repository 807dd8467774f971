"""The recurrences. Each computes its gate from pretrained keys, keeps a state of fixed size, and has a row below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.model.recurrences.base import Recurrence, register
from linearize.model.recurrences.delta import RWKV7, GatedDeltaNet, KimiDeltaAttention
from linearize.model.recurrences.gated import (
    HGRN2,
    MLSTM,
    RWKV6,
    GatedLinearAttention,
    GatedRetention,
    GateLoop,
    LightNet,
    LinearAttention,
    Mamba2,
    Retention,
)
from linearize.model.recurrences.slots import RGLRU, GatedSlotAttention, MinGRU

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig

RECURRENCES: dict[str, type[Recurrence]] = {
    "gla": GatedLinearAttention,
    "hgrn2": HGRN2,
    "gsa": GatedSlotAttention,
    "gated_retention": GatedRetention,
    "retention": Retention,
    "mamba2": Mamba2,
    "mlstm": MLSTM,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "gateloop": GateLoop,
    "lightnet": LightNet,
    "rg_lru": RGLRU,
    "mingru": MinGRU,
    "linear": LinearAttention,
}


def build_recurrence(config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> Recurrence | None:
    """The recurrence that `config` names, for the heads of `layer`; None for `none`.

    Args:
        depth: the relative depth of the layer, 0 for the first and 1 for the last.

    Raises:
        ValueError: the name is unknown, or the recurrence does not support the other options.
    """
    if config.recurrence == "none":
        return None
    if config.recurrence not in RECURRENCES:
        raise ValueError(f"unknown recurrence {config.recurrence!r}; there are: {', '.join(RECURRENCES)}")
    return RECURRENCES[config.recurrence](config, layer, depth)


__all__ = ["RECURRENCES", "Recurrence", "build_recurrence", "register"]
