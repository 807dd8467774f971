"""The benchmark's table and plot."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from evals.recurrences import toy
from linearize.report.plots import Axis, Lines, Plot, Series

_CONTENDERS = ("fused", "composed", "causal")


def markdown(result: dict[str, Any]) -> str:
    """A row for each case: milliseconds of every contender, and the fused kernels' share of the roof."""
    roof = result["roof"]
    rows = []
    for (shape, kind, length, count), found in _cases(result).items():
        rows.append(
            {
                "heads": shape,
                "what": kind,
                "tokens": f"{count} x {length}" if kind != "step" else f"{count} after {length}",
                **{name: f"{found[name]['seconds'] * 1e3:.3g} ms" for name in _CONTENDERS},
                **({"estimated": f"{found['fused']['estimate'] * 1e3:.3g} ms"} if "estimate" in found["fused"] else {}),
                "of the roof": f"{found['fused']['percent_of_roof']:.0f} %",
                "peak of training": _bytes(found["fused"]["peak_bytes"]),
            }
        )
    measured = f"{roof['bytes_per_second'] / 1e12:.3g} TB/s and {roof['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return f"{result['device']}, {result['dtype']}; roof as measured: {measured}\n\n{toy.markdown(rows)}"


def estimated(rows: list[dict[str, Any]]) -> str:
    """A row for each shape and length: launches, bytes per token and estimated milliseconds of both passes."""
    cases: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cases[row["shape"], row["length"], row["rows"]][row["pass"]].append(row)
    return toy.markdown(
        [
            {
                "heads": shape,
                "tokens": f"{count} x {length}",
                **{
                    f"{name}: {what}": text
                    for name, part in passes.items()
                    for what, text in (
                        ("launches", f"{len(part)}"),
                        ("KiB a token", f"{sum(row['bytes'] for row in part) / 1024:.0f}"),
                        ("estimate", f"{sum(row['estimate'] for row in part) * 1e3:.2f} ms"),
                    )
                },
            }
            for (shape, length, count), passes in cases.items()
        ]
    )


def compared(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """A row for each shape, length and pass: estimated milliseconds of the fused kernels, of the parts that would be
    composed in their place and of their sum, and of causal attention."""
    ours: dict[tuple[str, int, str], float] = defaultdict(float)
    parts: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        ours[row["shape"], row["length"], row["pass"]] += row["estimate"]
    for row in others:
        parts[row["shape"], row["length"], row["pass"]][row["part"]] = row["estimate"]
    return toy.markdown(
        [
            {
                "heads": shape,
                "length": f"{length}",
                "pass": name,
                "fused": f"{ours[shape, length, name] * 1e3:.2f} ms",
                **{part: f"{found[part] * 1e3:.2f}" for part in ("gla", "window", "mix")},
                "composed": f"{sum(taken for part, taken in found.items() if part != 'causal') * 1e3:.2f} ms",
                "causal": f"{found['causal'] * 1e3:.2f} ms",
            }
            for (shape, length, name), found in parts.items()
        ]
    )


def plot(result: dict[str, Any]) -> str:
    """Forward and backward together by length, of the first shape; one line for each contender."""
    cases = _cases(result)
    shape = next(iter(cases))[0]
    points: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
    for (name, kind, length, count), found in cases.items():
        if name == shape and kind == "forward":
            back = cases[name, "backward", length, count]
            for contender in _CONTENDERS:
                seconds = found[contender]["seconds"] + back[contender]["seconds"]
                points[contender].append((length, seconds * 1e3, None))
    lines = [Series(name, points[name], look) for look, name in enumerate(_CONTENDERS)]
    title = f"Forward and backward, {shape}, {result['device']}"
    if result.get("dry_run"):
        title += " (dry run: not measurements)"
    ticks = [tokens for tokens, _, _ in points["fused"]]
    x = Axis("tokens per text, the same number in all", lambda value: f"{value:,.0f}", log=True, ticks=ticks)
    y = Axis("milliseconds", lambda value: f"{value:.3g}", log=True)
    return Plot("kernels", title, [Lines(x, y, lines)]).alone


def _cases(result: dict[str, Any]) -> dict[tuple[str, str, int, int], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, str, int, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["results"]:
        cases[row["shape"], row["kind"], row["length"], row["rows"]][row["contender"]] = row
    return dict(cases)


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"
