"""Figures as text, the same in tables, pages, plots and the terminal."""

from __future__ import annotations

# Metrics that are shares in [0, 1], written in percent as papers print them.
_SHARES = {"acc", "acc_norm", "agreement", "common_prefix", "exact_match", "repetition"}


def is_share(metric: str) -> bool:
    """True if the metric's values are shares, written in percent. `exact_match,strict-match` is named by its first
    word."""
    name = metric.partition(",")[0]
    return name in _SHARES or name.endswith("_acc")


def number(value: float, metric: str) -> str:
    """A value of a metric, without its unit: shares in percent."""
    if is_share(metric):
        return fixed(100 * value, 1)
    return fixed(value, 2 if "perplexity" in metric else 4)


def with_error(value: float, stderr: float | None, metric: str) -> str:
    """`45.0 ± 1.0`; the value alone without an error."""
    return number(value, metric) + ("" if stderr is None else f" ± {number(stderr, metric)}")


def heading(task: str, metric: str, higher_is_better: bool) -> str:
    """`arc_easy acc % ↑`."""
    unit = " %" if is_share(metric) else ""
    return f"{task} {metric.replace('_', ' ')}{unit} {'↑' if higher_is_better else '↓'}"


def percent_text(percent: float | None) -> str:
    """`98.4 %`."""
    return "–" if percent is None else f"{fixed(percent, 1)} %"


def readable_bytes(count: float) -> str:
    """`6105600` as `6.1 MB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def readable_count(count: float) -> str:
    """`70778880` as `70.8 M`."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def readable_length(tokens: float) -> str:
    """`512`, `4k`, `1M` if exact, otherwise `1,000`."""
    whole = round(tokens)
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole:,}"


def fixed(value: float, digits: int) -> str:
    """`-1234.5` with `digits` decimals: `−1,234.5`. A value that rounds to zero has no minus."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def _scaled(count: float, units: tuple[str, ...]) -> str:
    """A count in the largest unit that keeps it at 1 or more; each unit is a thousand of the one before."""
    place = 0
    while count >= 1000 and place < len(units) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.1f} {units[place]}" if place else f"{count:.0f} {units[0]}".rstrip()
