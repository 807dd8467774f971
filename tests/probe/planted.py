"""A GPT-2 made by hand whose one head, and no other, finds a needle and copies it.

Tokens are bytes. In layer 0 `BEFORE` looks at the token before (positions are angles, which a matrix turns back by one)
and writes it down; in layer 1 `COPIES` looks for places whose token before is the one at hand, and says what stands
there: an induction head. All other heads look everywhere alike and write nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.conftest import random_llama

if TYPE_CHECKING:
    from pathlib import Path

COPIES = (1, 2)
BEFORE = (0, 1)
HEADS, WIDTH, CODE, ANGLES = 4, 64, 48, 16
TOKEN, PREVIOUS, PLACE, ANSWER = (slice(48 * i, 48 * i + width) for i, width in enumerate((48, 48, 32, 48)))


def planted_folder(folder: Path) -> Path:
    """Writes the model with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(random_llama(folder / "bytes"))
    config = GPT2Config(
        vocab_size=257, n_positions=1024, n_embd=HEADS * WIDTH, n_layer=2, n_head=HEADS, n_inner=8, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data.zero_()
    codes = torch.randint(0, 2, (257, CODE)) * 2.0 - 1
    body = model.transformer
    body.wte.weight.data[:, TOKEN] = codes
    model.lm_head.weight.data[:, ANSWER] = codes
    speeds = torch.logspace(-2.5, 0.3, ANGLES)
    angles = torch.arange(1024)[:, None] * speeds
    body.wpe.weight.data[:, PLACE] = torch.cat([angles.cos(), angles.sin()], 1)
    back = torch.zeros(2 * ANGLES, 2 * ANGLES)
    pairs = torch.arange(ANGLES)
    back[pairs, pairs] = back[pairs + ANGLES, pairs + ANGLES] = speeds.cos()
    back[pairs + ANGLES, pairs], back[pairs, pairs + ANGLES] = speeds.sin(), -speeds.sin()
    one = torch.eye(CODE)
    _head(body.h[0].attn, BEFORE[1], (PLACE, 60 * back), (PLACE, torch.eye(2 * ANGLES)), (TOKEN, PREVIOUS, one))
    _head(body.h[1].attn, COPIES[1], (TOKEN, 4 * one), (PREVIOUS, 4 * one), (TOKEN, ANSWER, 4 * one))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _head(attention, head, query, key, copied) -> None:
    """Sets what a head asks for, what it is found by, and what it copies where."""
    start, everything = head * WIDTH, HEADS * WIDTH
    weight = attention.c_attn.weight.data
    for offset, (source, matrix) in enumerate((query, key)):
        first = offset * everything + start
        weight[source, first : first + matrix.shape[1]] = matrix
    source, target, matrix = copied
    first = 2 * everything + start
    weight[source, first : first + matrix.shape[1]] = matrix
    attention.c_proj.weight.data[start : start + matrix.shape[1], target] = torch.eye(matrix.shape[1])
