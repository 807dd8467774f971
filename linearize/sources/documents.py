"""Keep the documents of a packed row apart in a pretrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def documents_apart(teacher: PreTrainedModel, position_ids: Tensor) -> dict[str, Tensor]:
    """Extra forward arguments, besides positions `[B, T]`, that keep the documents of a packed row apart in a teacher.

    Most architectures detect documents by their positions and need none. For others (Falcon) the result is an
    `attention_mask` `[B, 1, T, T]`.
    """
    if teacher not in _TELLS_APART:
        _TELLS_APART[teacher] = _tells_apart(teacher, position_ids.device)
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if _TELLS_APART[teacher] or not bool(starts.any()):
        return {}
    document = torch.nn.functional.pad(starts.cumsum(1), (1, 0))
    seen = (document[:, :, None] == document[:, None]).tril()[:, None]
    return {"attention_mask": torch.where(seen, 0.0, torch.finfo(teacher.dtype).min).to(teacher.dtype)}


_TELLS_APART: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _tells_apart(teacher: PreTrainedModel, device: torch.device) -> bool:
    """True if the logits do not depend on an earlier document in the row. The model is run on an example, because only
    the architecture's code determines it."""
    positions = torch.arange(8, device=device).repeat(2)[None]
    answers = []
    for first in (1, 2):
        ids = torch.full_like(positions, first)
        ids[:, 8:] = 3
        logits = teacher(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 8:].float()
        answers.append(logits - logits.mean(-1, keepdim=True))
    return bool((answers[0] - answers[1]).norm() < 1e-2 * answers[0].norm())
