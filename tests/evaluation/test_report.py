"""The report's figures and its table."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from linearize.evaluation.heldout import RowScores
from linearize.evaluation.results.report import SystemScores, report_data, report_table
from linearize.evaluation.tasks.task import TaskScore


def _accuracy(value: float) -> TaskScore:
    return TaskScore("arc_easy", "acc", value, 0.01, True, [0.0] * 100)


def _perplexity(value: float) -> TaskScore:
    return TaskScore("wikitext2", "word_perplexity", value, 0.2, False, [0.0] * 62)


def _rows(loss: float, kl: float | None) -> RowScores:
    ones = torch.ones(4, dtype=torch.float64)
    spread = torch.tensor([-0.1, 0.1, -0.1, 0.1], dtype=torch.float64)
    divergence = None if kl is None else kl * ones
    agreement = None if kl is None else 0.9 * ones
    return RowScores(loss + spread, divergence, agreement, torch.full((4,), 7))


@pytest.fixture
def systems() -> dict[str, SystemScores]:
    return {
        "teacher": SystemScores([_accuracy(0.5), _perplexity(20.0)], _rows(2.0, None)),
        "window": SystemScores([_accuracy(0.25), _perplexity(80.0)]),
        "linear": SystemScores([_accuracy(0.45), _perplexity(25.0)], _rows(2.1, 0.05)),
    }


def test_percent_of_teacher_reads_the_same_way_for_every_metric(systems: dict[str, SystemScores]) -> None:
    rows = {(row["task"], row["metric"]): row["values"] for row in report_data(systems)["metrics"]}
    accuracy, perplexity = rows["arc_easy", "acc"], rows["wikitext2", "word_perplexity"]
    assert [accuracy[name]["percent_of_teacher"] for name in systems] == pytest.approx([100, 50, 90])
    assert [perplexity[name]["percent_of_teacher"] for name in systems] == pytest.approx([100, 25, 80])
    held_out = rows["held-out", "perplexity"]["linear"]
    assert held_out["percent_of_teacher"] == pytest.approx(100 * 2.718281828**-0.1)
    for metric in ("loss", "kl", "agreement"):
        assert rows["held-out", metric]["linear"]["percent_of_teacher"] is None


def test_data_is_json_and_keeps_the_order(systems: dict[str, SystemScores]) -> None:
    data = json.loads(json.dumps(report_data(systems), allow_nan=False))
    assert data["systems"] == list(systems)
    assert [row["metric"] for row in data["metrics"]] == [
        "acc",
        "word_perplexity",
        "loss",
        "perplexity",
        "kl",
        "agreement",
    ]
    loss = data["metrics"][2]["values"]
    assert set(loss) == {"teacher", "linear"}
    assert loss["teacher"]["n"] == 4
    assert loss["teacher"]["stderr"] == pytest.approx(0.1 * (4 / 3) ** 0.5 / 2)


def test_without_a_teacher_there_are_no_percentages(systems: dict[str, SystemScores]) -> None:
    del systems["teacher"]
    cells = [cell for row in report_data(systems)["metrics"] for cell in row["values"].values()]
    assert all(cell["percent_of_teacher"] is None for cell in cells)


def test_a_teacher_that_scores_nothing_gives_no_percentage() -> None:
    data = report_data({"teacher": SystemScores([_accuracy(0.0)]), "linear": SystemScores([_accuracy(0.1)])})
    assert data["metrics"][0]["values"]["linear"]["percent_of_teacher"] is None


def test_table_shows_values_errors_and_percentages(systems: dict[str, SystemScores]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report_table(systems, title="Recovery"))
    text = console.export_text()
    for expected in (
        "Recovery",
        "arc_easy acc % ↑",
        "45.0 ± 1.0",
        "90.0 % of teacher",
        "25.00 ± 0.20",
        "80.0 % of teacher",
    ):
        assert expected in text
    assert "wikitext2 word perplexity ↓" in text
    # The teacher's own column carries no percentage.
    assert text.count("% of teacher") == 5
