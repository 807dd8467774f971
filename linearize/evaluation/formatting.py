"""How figures are written for people, the same in tables, pages and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linearize.evaluation.pairing import Closed, Difference

# Metrics that are shares in [0, 1]. They are written in percent, as papers print them.
_SHARES = {"acc", "acc_norm", "agreement", "common_prefix", "exact_match", "repetition"}


def is_share(metric: str) -> bool:
    """Whether a metric's values are shares, and written in percent."""
    return metric in _SHARES


def number(value: float, metric: str) -> str:
    """A value of a metric, without its unit: shares in percent."""
    scale, digits = _form(metric)
    return _written(scale * value, digits)


def with_error(value: float, stderr: float | None, metric: str) -> str:
    """`45.0 ± 1.0`; without an error where there is none."""
    return number(value, metric) + ("" if stderr is None else f" ± {number(stderr, metric)}")


def heading(task: str, metric: str, higher_is_better: bool) -> str:
    """`arc_easy acc % ↑`."""
    unit = " %" if is_share(metric) else ""
    return f"{task} {metric.replace('_', ' ')}{unit} {'↑' if higher_is_better else '↓'}"


def difference_text(found: Difference | None, metric: str) -> str:
    """`−0.8 ± 0.3 *`, where * marks a significant one."""
    if found is None:
        return "–"
    sign = "+" if found.value > 0 and number(found.value, metric).strip("0.") else ""
    return sign + with_error(found.value, found.stderr, metric) + (" *" if found.significant else "")


def p_text(found: Difference | None) -> str:
    """The corrected p: `0.013`."""
    if found is None or found.p_corrected is None:
        return "–"
    p = found.p_corrected
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent_text(percent: float | None) -> str:
    """`98.4 %`."""
    return "–" if percent is None else f"{_written(percent, 1)} %"


def closed_text(found: Closed | None) -> str:
    """`41.0 ± 12.3 %`."""
    if found is None:
        return "–"
    error = "" if found.stderr is None else f" ± {_written(100 * found.stderr, 1)}"
    return f"{_written(100 * found.value, 1)}{error} %"


def readable_bytes(count: float) -> str:
    """`6105600` as `6.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def readable_length(tokens: float) -> str:
    """`512`, `4k`, `1M` where these are exact, otherwise `1,000`."""
    whole = round(tokens)
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole:,}"


def _written(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    # No minus before what is rounded to nothing.
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def _form(metric: str) -> tuple[float, int]:
    # One decimal of a percent; of losses enough digits to tell small differences.
    return (100.0, 1) if is_share(metric) else (1.0, 2 if "perplexity" in metric else 4)
