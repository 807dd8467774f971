"""Faults that are planted in a model show in its report."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.conversion.swap import convert_model, window_baseline
from linearize.evaluation.results.comparison import compare_systems
from linearize.evaluation.results.report import write_report
from linearize.evaluation.results.results import Results, SystemInfo, SystemScores
from linearize.evaluation.systems import score_systems
from linearize.evaluation.tasks.suites import SuiteOptions, build_suites
from linearize.model import LinearizedForCausalLM
from linearize.recipe import MixerSpec

from . import data_folder, tiny_model_folder

SPEC = MixerSpec(window=16)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder())


def converted(teacher: Any, weight: float = 0.05) -> LinearizedForCausalLM:
    """A model whose recurrence has a say."""
    model = convert_model(copy.deepcopy(teacher), SPEC)
    for attention in model.attention_layers:
        torch.nn.init.constant_(attention.mixer.mix_weight, weight)  # type: ignore[union-attr]
    return model


def score(**systems: Any) -> dict[str, SystemScores]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    options = SuiteOptions(data=data_folder(), lengths=[400], samples=8)
    tasks = build_suites({"length": ["loss_by_position"]}, tokenizer, options)
    loaders = {name: (lambda one=one: one) for name, one in systems.items()}
    return score_systems(loaders, tokenizer, tasks, rows=None, teacher=None)


@pytest.fixture(scope="module")
def measured(teacher: Any) -> dict[str, SystemScores]:
    """The teacher and the baseline that everything is measured by."""
    return score(
        teacher=teacher, window=window_baseline(copy.deepcopy(teacher), converted(teacher).config.mixers or [])
    )


def report(measured: dict[str, SystemScores], model: Any, folder: Path) -> tuple[str, Results]:
    """The report's text on `model`; what it is without its recurrence is the window baseline."""
    scores = {**measured, "no_recurrence": measured["window"], **score(model=model)}
    found = Results("planted", [SystemInfo(name) for name in scores], scores)
    write_report(found, folder)
    return (folder / "report.md").read_text(encoding="utf-8").replace("\\", ""), found


def told_of_the_model(text: str) -> str:
    return text.partition("**model**")[2].partition("**")[0]


def test_a_recurrence_multiplied_by_zero(teacher: Any, measured: Any, tmp_path: Path) -> None:
    text, _ = report(measured, converted(teacher, weight=0.0), tmp_path / "dead")
    assert "With its recurrence off every item scores the same: the recurrence does nothing here." in text
    assert re.search(r"Nothing here shows [\w ]*\bmodel to be better than the window baseline", text)
    text, _ = report(measured, converted(teacher), tmp_path / "alive")
    assert "does nothing" not in text and "With its recurrence off" in told_of_the_model(text)


@pytest.mark.public  # rests on a model that was trained well
def test_a_window_one_token_short(teacher: Any, measured: Any, tmp_path: Path) -> None:
    short = converted(teacher, weight=0.0)
    for attention in short.attention_layers:
        attention.mixer.window -= 1  # type: ignore[union-attr]
    text, found = report(measured, short, tmp_path)
    (cell,) = (row.cells["model"] for table in compare_systems(found) for row in table.rows)
    assert cell.to_window is not None and cell.to_window.value > 0 and cell.to_window.significant
    assert "worse than the window baseline on 1 of" in told_of_the_model(text)


def test_a_teacher_beside_itself(teacher: Any, measured: Any, tmp_path: Path) -> None:
    text, found = report(measured, teacher, tmp_path)
    for row in (row for table in compare_systems(found) for row in table.rows):
        cell = row.cells["model"]
        assert cell.percent_of_teacher in (None, pytest.approx(100.0))
        assert cell.to_teacher is not None and cell.to_teacher.value == 0 and not cell.to_teacher.significant
    assert re.search(r"No figure tells [\w ]*\bmodel from the teacher with significance", text)
