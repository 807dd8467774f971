"""Keeps the libraries' own words off the terminal; called by a command before it imports any of them."""

from __future__ import annotations

import os
import warnings


def quiet_libraries(*, bars: bool = False) -> None:
    """No progress bars (but the Hub's, if asked for), no advice about versions, no warnings: what matters is said by
    the command itself."""
    if os.environ.get("LINEARIZE_DEBUG") == "1":
        return
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # every retry of a request would be a line of its own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
