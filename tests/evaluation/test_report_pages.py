"""The report as pages: every figure is there, and the HTML needs nothing else and is well-formed."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from linearize.evaluation.results.comparison import compare_systems
from linearize.evaluation.results.pairing import difference_text, p_text
from linearize.evaluation.results.report import write_report
from linearize.evaluation.results.results import Results, SystemInfo, SystemScores
from linearize.evaluation.results.telling import summary, tell
from linearize.report.formatting import percent_text, with_error
from linearize.report.pages import Page, to_markdown
from linearize.report.svg import STYLE

from .results_kit import accuracy, answers, needles, results, system

HOSTILE = '<script>alert("x")</script> & | `[a](b)` *\x1b[31m'


def _fetches(name: str, value: str) -> bool:
    """True if an attribute fetches or runs something; references within the page do not."""
    return name.startswith("on") or (name in ("src", "href", "xlink:href") and not value.startswith("#"))


class Checker(HTMLParser):
    """Notes tags that are not closed, and everything that a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.check(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.check(tag, attrs)

    def check(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img", "object", "embed"):
            self.faults.append(tag)
        self.faults += [f"{tag} {name}" for name, value in attrs if _fetches(name, value or "")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(folder: Path) -> str:
    """The page's text, after its form was checked."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert (checker.faults, checker.open) == ([], [])
    assert set(re.findall(r"url\(.", page)) <= {"url(#"}
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {*re.findall(r"""(?:url\(|href=")#([^")]+)""", page)} <= {*ids}
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    # Also XML, once the doctype is gone.
    ET.fromstring(page.partition("\n")[2])  # noqa: S314 - written by us
    for svg in folder.glob("*.svg"):
        ET.fromstring(svg.read_text(encoding="utf-8"))  # noqa: S314
    return checker.text.replace("\u00a0", " ")


def figures(found: Results) -> list[str]:
    texts = []
    for table in compare_systems(found):
        for row in table.rows:
            for name, cell in row.cells.items():
                texts.append(with_error(cell.value, cell.stderr, row.metric))
                if name != "teacher":
                    texts += [percent_text(cell.percent_of_teacher), difference_text(cell.to_teacher, row.metric)]
                    texts.append(p_text(cell.to_teacher))
    return texts


def test_both_pages_hold_every_figure(tmp_path: Path) -> None:
    found = results()
    write_report(found, tmp_path)
    shown = check_page(tmp_path)
    plain = (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\", "")
    for text in figures(found):
        assert text in shown
        assert text in plain
    for text in ("62.5 ± 7.8", "83.3 %", "−12.5 ± 5.3", "+12.5 ± 5.3", "50.0 ± ", "46.1 kB", "6.1 MB"):
        assert text in shown
        assert text in plain
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_every_plot_is_a_file_and_in_the_page(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.svg")}
    assert names == {"books-loss-by-position", "needle-acc-by-length", "needle-acc-by-depth", "memory"}
    assert (tmp_path / "report.html").read_text().count("<svg ") == 4
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"({name}.svg)" in markdown for name in names)
    assert f"<style>{STYLE}</style>" in (tmp_path / "memory.svg").read_text()


def test_the_page_is_for_light_and_dark_screens_and_for_phones(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count(STYLE) == 1 and "color-scheme:light dark" in page
    assert page.count("prefers-color-scheme:dark") == 2 and 'name="viewport"' in page
    tables = page.count("<table>")
    assert page.count('<div class="scroll" role="region" tabindex="0" aria-label="') == tables
    assert 0 < page.count('class="hint"') <= tables and ".hint{display:block}" in page
    assert all(f'aria-label="{title}"' in page for title in ("books: loss by position", "needle: accuracy by length"))
    shown = check_page(tmp_path)
    assert "teacher: 4 at 32, 3.5 at 128, 3.15 at 512." in shown


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    found = results(model=HOSTILE, command=HOSTILE)
    found.systems[2] = SystemInfo(HOSTILE, HOSTILE, 100, 0)
    found.scores[HOSTILE] = found.scores.pop("model")
    found.scores[HOSTILE] = SystemScores(
        [*found.scores[HOSTILE].tasks, accuracy(HOSTILE, answers(3, 4), suite=HOSTILE), needles([1.0, 0.0, 1.0, 0.0])],
        found.scores[HOSTILE].rows,
    )
    write_report(found, tmp_path)
    assert '<script>alert("x")</script>' in check_page(tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert html.escape("<script>") not in (tmp_path / "report.md").read_text()
    assert "\x1b" not in (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert r"\<script\>" in (tmp_path / "report.md").read_text()
    assert all(re.fullmatch(r"[a-z0-9-]+", path.stem) for path in tmp_path.glob("*.svg"))


def test_the_summary_says_what_was_kept_and_lost() -> None:
    found = results()
    [(name, sentences)] = summary(found, compare_systems(found))
    text = " ".join(sentences)
    assert name == "model"
    assert "Core, mean of 2 accuracies: 60.0 ± 5.5 %, which is 82.8 % of the teacher's 72.5 ± 5.0 %" in text
    # Of 40 items the model has 5 more than the baseline and the teacher 10: sqrt(2 * (2.5 / 39 / 40)) / 2 / 0.25.
    assert "50.0 ± 11.3 % of the distance from the window baseline is closed" in text
    assert "Held-out loss: +0.2000 ± 0.0000 nats per token beside the teacher's" in text
    assert (
        "Memory of one sequence: 6.1 MB, whatever its length; at 131,072 tokens the teacher's cache is 6.0 GB" in text
    )


def test_a_teacher_beside_itself() -> None:
    found = results()
    found.scores["model"] = found.scores["teacher"]
    for table in compare_systems(found):
        for row in table.rows:
            cell = row.cells["model"]
            assert cell.percent_of_teacher in (None, pytest.approx(100.0))
            if cell.to_teacher is not None:
                assert cell.to_teacher.value == 0.0
                assert not cell.to_teacher.significant
            assert row.cells["teacher"].to_teacher is None or row.cells["teacher"].to_teacher.value == 0.0
    (_, sentences) = summary(found, compare_systems(found))[-1]
    text = " ".join(sentences)
    assert "No figure tells model from the teacher with significance" in text


def test_all_answers_wrong(tmp_path: Path) -> None:
    found = results()
    found.scores["model"] = SystemScores([accuracy("piqa", answers(0, 40)), accuracy("arc_easy", answers(0, 40))])
    row = compare_systems(found)[0].rows[0]
    assert row.cells["model"].percent_of_teacher == 0.0
    assert row.cells["model"].to_teacher is not None
    assert row.cells["model"].to_teacher.p == pytest.approx(2 / 2**30)
    assert row.cells["model"].to_teacher.significant
    write_report(found, tmp_path)
    shown = check_page(tmp_path)
    assert "0.0 ± 0.0" in shown
    assert "Significantly worse than the teacher on 3 of 3 measures (piqa, arc_easy, the mean of core)" in shown
    assert "Nothing here shows model to be better than the window baseline" in shown


def test_a_system_without_a_task_is_left_out_of_it_and_of_the_mean(tmp_path: Path) -> None:
    found = results()
    found.scores["model"] = SystemScores([accuracy("piqa", answers(25, 40))])
    core = compare_systems(found)[0]
    assert [sorted(row.cells) for row in core.rows] == [
        ["model", "teacher", "window"],
        ["teacher", "window"],
        ["teacher", "window"],
    ]
    write_report(found, tmp_path)
    check_page(tmp_path)


def test_one_item_and_few_systems(tmp_path: Path) -> None:
    for number, names in enumerate((["teacher", "window", "model"], ["model"], ["teacher"], ["teacher", "window"], [])):
        scores = {name: SystemScores([accuracy("piqa", [1.0]), needles([1.0] * 4)]) for name in names}
        found = results(scores=scores, systems=[SystemInfo(name) for name in names])
        write_report(found, tmp_path / str(number))
        check_page(tmp_path / str(number))
    without = results(scores={"model": scores}, systems=[SystemInfo("model")])
    assert "nothing here says what was kept or lost" in summary(without, [])[0][1][0]


def test_the_mean_of_five_is_of_the_five_that_papers_report() -> None:
    names = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada")
    tasks = [accuracy(name, answers(right, 10)) for name, right in zip(names, (5, 6, 7, 8, 9, 0), strict=True)]
    found = Results("m", [SystemInfo("teacher")], {"teacher": SystemScores(tasks)})
    mean = compare_systems(found)[0].rows[-1]
    assert mean.mean_of == names[:5]
    assert mean.cells["teacher"].value == pytest.approx(0.7)
    variance = sum(right / 10 * (1 - right / 10) * 10 / 9 / 10 for right in (5, 6, 7, 8, 9))
    assert mean.cells["teacher"].stderr == pytest.approx(variance**0.5 / 5)


def test_correction_is_over_the_tests_of_a_table() -> None:
    core = compare_systems(results())[0]
    tests = [d for row in core.rows for cell in row.cells.values() for d in (cell.to_teacher, cell.to_window)]
    corrected = [d for d in tests if d is not None and d.p_corrected is not None]
    # Two tasks and their mean; window and model beside the teacher, model beside window.
    assert len(corrected) == 9
    smallest = min(corrected, key=lambda d: d.p if d.p is not None else 1.0)
    assert smallest.p is not None
    assert smallest.p_corrected == pytest.approx(min(1.0, 9 * smallest.p))


def test_what_only_some_items_have() -> None:
    odd = accuracy("needle", [1.0, 0.0], "recall", tags=[{"length": 512, "depth": 0.5}, {"length": "long"}])
    found = Results("m", [SystemInfo("teacher")], {"teacher": SystemScores([odd])})
    page = tell(found)
    assert [plot.name for section in page.sections for plot in section.plots] == ["needle-acc-by-depth"]


def test_many_systems_with_long_names(tmp_path: Path) -> None:
    infos = [SystemInfo("teacher", "", 0, 10), *(SystemInfo(f"{'long' * 20}-{i}", "x" * 300, 10, 0) for i in range(12))]
    scores = {info.name: system(20, 0.1, [1.0, 0.5, 0.25, 0.0]) for info in infos}
    write_report(results(systems=infos, scores=scores), tmp_path)
    check_page(tmp_path)


def test_entities_and_strikes_in_a_name_stay_text_in_markdown() -> None:
    assert to_markdown(Page("&lt;b&gt; ~~x~~", [])).startswith(r"# \&lt;b\&gt; \~\~x\~\~")
