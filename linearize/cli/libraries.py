"""Suppresses messages of the libraries; a command calls it before it imports any of them."""

from __future__ import annotations

import os
import sys
import warnings


def quiet_libraries(*, bars: bool = False) -> None:
    """Disable the libraries' progress bars (with `bars` all but the Hub's), version hints and warnings, because the
    command prints its own messages."""
    if os.environ.get("LINEARIZE_DEBUG") == "1":
        return
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise each retry prints a line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"linearize\.")
    warnings.showwarning = _one_line
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "datasets" in sys.modules:  # it read its variable when it was imported
        sys.modules["datasets"].disable_progress_bars()


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    """A warning of this package, without the file and line that Python adds."""
    print(f"warning: {message}", file=sys.stderr)
