"""Limits of embedding tables: the number of learned positions, and tokenizer ids without a row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError


def context_of(config: Any) -> int | None:
    """The positions that the model was made for; None if the configuration names none."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context


def learned_positions(model: Any) -> int | None:
    """The number of learned position embeddings, which limits the length of a text; None for models without such a
    table, such as rotary models."""
    limit = context_of(model.config)
    words = model.get_input_embeddings()
    for module in model.modules():
        # Some tables have two extra rows for pads.
        table = isinstance(module, nn.Embedding) and module is not words
        if table and limit and 0 <= module.num_embeddings - limit <= 2:
            return limit
    return None


def check_length(model: Any, length: int, key: str) -> None:
    """Raises:
    DataError: the recipe's `key` sets rows of `length` tokens, and `model` has learned fewer positions.
    """
    limit = learned_positions(model)
    if limit is not None and length > limit:
        raise DataError(f"{key} {length:,}: the model has learned {limit:,} positions; choose up to that")


def vocabulary_warning(tokenizer: Any, config: Any, name: str) -> str | None:
    """One warning line with the tokenizer and embedding sizes if some token ids have no row; None if all have one."""
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
    DataError: `ids`, from the text named by `where`, contains a token without a row in the embedding.
    """
    rows: int = config.get_text_config().vocab_size
    if ids.numel() and (most := int(ids.max())) >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise DataError(f"{where}: has {token!r}, token {most:,}, and the model's embedding has {rows:,} rows")


def guard_embeddings(model: Any) -> None:
    """Make the embeddings of `model` raise a one-line `DataError` instead of an IndexError for ids without a row.

    CPU only: reading the largest id would sync a GPU at each call.
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
