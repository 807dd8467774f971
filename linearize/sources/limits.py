"""Embedding tables end: how many positions a model has learned, and which tokens of a tokenizer have no row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError


def learned_positions(model: Any) -> int | None:
    """The number of positions that a model has learned an embedding of, beyond which it cannot read; None for rotary
    models and others that have no such table."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules():
        # Some tables have two entries more than positions, for pads.
        table = isinstance(module, nn.Embedding) and module is not words
        if table and limit and 0 <= module.num_embeddings - limit <= 2:
            return int(limit)
    return None


def check_length(model: Any, length: int, key: str) -> None:
    """Raises:
    DataError: `key` of the recipe asks for rows of `length` tokens, and `model` has learned fewer positions.
    """
    limit = learned_positions(model)
    if limit is not None and length > limit:
        raise DataError(f"{key} {length:,}: the model has learned {limit:,} positions; choose up to that")


def vocabulary_warning(tokenizer: Any, config: Any, name: str) -> str | None:
    """One line with the sizes of `tokenizer` and of the embedding that `config` asks for, where some ids have no row;
    None where all have one."""
    rows: int = config.get_text_config().vocab_size
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return None
    first = min(beyond)
    return (
        f"{name}: its tokenizer has {max(beyond) + 1:,} tokens and its embedding {rows:,} rows, so text with "
        f"{beyond[first]!r} ({first}) or above cannot be read; resize the embedding to use them"
    )


def check_tokens(ids: Tensor, tokenizer: Any, config: Any, where: str) -> None:
    """Raises:
    DataError: `ids`, of text that `where` names, has a token that the embedding has no row for.
    """
    rows: int = config.get_text_config().vocab_size
    if ids.numel() and (most := int(ids.max())) >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise DataError(f"{where}: has {token!r}, token {most:,}, and the model's embedding has {rows:,} rows")


def guard_embeddings(model: Any) -> None:
    """Makes the embeddings of `model` refuse ids that they have no row for, in one line in the place of an IndexError.

    Only on a CPU: reading the largest id would sync a GPU at each call.
    """
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(partial(_refuse_beyond, module is words))


def _refuse_beyond(words: bool, table: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    assert isinstance(table, nn.Embedding)  # noqa: S101 - for the type checker
    ids = arguments[0]
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    if (most := int(ids.max())) < table.num_embeddings:
        return
    if words:
        raise DataError(
            f"token {most:,} has no row in the model's embedding, which has {table.num_embeddings:,}; use the model's "
            "own tokenizer, or resize the embedding"
        )
    raise DataError(
        f"the text needs {most + 1:,} positions and the model has learned {table.num_embeddings:,}; shorten the text"
    )
