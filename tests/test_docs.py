"""The pages in docs: their Python runs, in order, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from linearize.model import LinearizedForCausalLM
from linearize.model.recurrences import RECURRENCES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def python_of(page: str) -> str:
    """The page's blocks of Python as one program, each on its own lines of the page."""
    inside, lines = False, []
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = (line == "```python") if fence else inside
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert all((page.parent / link).exists() for link in links)


def test_a_recurrence_is_added_as_the_page_says(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_folder)
    page: dict[str, Any] = {"__name__": "page"}
    before = dict(RECURRENCES)
    try:
        exec(compile(python_of("adding-a-recurrence.md"), "adding-a-recurrence.md", "exec"), page)  # noqa: S102
    finally:
        for name in RECURRENCES.keys() - before:
            del RECURRENCES[name]
    assert page["losses"][-1] < page["losses"][0]
    # Where nobody has registered it, a checkpoint says so.
    with pytest.raises(ValueError, match="layer 0: unknown recurrence 'longhorn'; there are: gla, "):
        LinearizedForCausalLM.from_pretrained("longhorn")


def test_the_commands_are_functions(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").symlink_to(tiny_folder)
    page: dict[str, Any] = {"__name__": "page"}
    exec(compile(python_of("python.md"), "python.md", "exec"), page)  # noqa: S102
    assert list(page["results"].scores) == ["teacher", "window", "model"]
    assert page["told"].new_tokens == 20 and page["more"].new_tokens == 5
    assert (tmp_path / "smol-gla" / "README.md").stat().st_size == page["shared"].files["README.md"]
    assert "### What was kept, and what was lost" in (tmp_path / "smol-gla" / "README.md").read_text()
    assert "no such folder or file" in str(page["error_seen"])


def test_files_that_the_page_names_are_there() -> None:
    named = set(
        re.findall(r"`((?:linearize|kernels|tests|recipes)/[\w./]+)`", (DOCS / "adding-a-recurrence.md").read_text())
    )
    assert len(named) > 5
    assert all((DOCS.parent / name).exists() for name in named if "NAME" not in name)
