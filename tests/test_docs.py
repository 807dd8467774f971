"""The pages in docs: their code runs, in order, their settings are settings, and their links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from linearize.cli.reference import reference
from linearize.families import FAMILIES
from linearize.model import LinearizedForCausalLM
from linearize.model.recurrences import RECURRENCES
from linearize.recipe import DataSpec, load_recipe
from tests.docs_kit import DOCS, Block, blocks_of, options_of, run_page, shortened
from tests.hub.conftest import hub as hub

PAGES = sorted(DOCS.glob("*.md"))
RUN = [
    "quickstart",
    "your-model",
    "your-data",
    "reading-the-report",
    "choosing-a-recurrence",
    "serving",
    "new-family",
    "start",
    "scale",
    "landmarks",
]
ROOT = DOCS.parent


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a page runs: an empty folder with a model in it, and text."""
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "page" / "model").symlink_to(tiny_folder)
    stories = [
        f"Once upon a time there were {n} cats and a dog. They ran home, and {n} birds sang." for n in range(900)
    ]
    Path("book.txt").write_text("\n\n".join(stories))
    Path("long-texts.jsonl").write_text("\n".join(json.dumps({"text": " ".join(stories[n::9])}) for n in range(9)))
    families, recurrences = dict(FAMILIES), dict(RECURRENCES)
    yield tmp_path / "page"
    for registry, before in ((FAMILIES, families), (RECURRENCES, recurrences)):
        for name in registry.keys() - before.keys():
            del registry[name]


def anchors(page: Path) -> set[str]:
    """What headings of a page are linked by, as GitHub and mkdocs make it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^) ]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_site_and_in_the_index() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert site.count(f": {page.name}\n") == 1, page.name
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_reference_is_what_the_commands_say() -> None:
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == reference(), "run: make docs"


ALL = [(page.name, block) for page in PAGES for block in blocks_of(page.name)]


@pytest.mark.parametrize(("page", "block"), ALL, ids=lambda one: str(one.line) if isinstance(one, Block) else one)
def test_blocks_are_what_they_say(page: str, block: Block) -> None:
    """Commands have their options and shipped recipes exist, Python compiles, and settings are a recipe's."""
    if block.language == "python":
        compile(block.code, page, "exec")
    elif block.language == "yaml":
        settings = yaml.safe_load(block.code)
        if settings.keys() == {"data"}:
            DataSpec.model_validate(settings["data"])
        else:
            load_recipe("window-gla", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    elif block.language == "sh":
        for line in block.code.splitlines():
            words = shortened(line)
            if words[:1] == ["linearize"]:
                given = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
                assert given <= options_of(words), line
    else:
        assert block.language == "text", f"{page}:{block.line}: which language?"


# Of every command, and of accelerate and torchrun, pip, llama-gguf-split, vLLM, and the scripts in evals/.
_OTHERS = {
    "--help", "--merge", "--max-restarts", "--no-deps", "--gpu-memory-utilization", "--enable-prefix-caching",
    "--quantization", "--estimate", "--extra-index-url", "--enable-lora",
}  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_options_in_the_text_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[a-z-]+", code)}
    known = set(re.findall(r"(?<!\S)`?(--[a-z-]+)", reference())) | _OTHERS
    assert named <= known, named - known


@pytest.mark.parametrize("page", RUN)
@pytest.mark.check
def test_a_page_runs(place: Path, page: str) -> None:
    run_page(f"{page}.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["start", "serving"])
def test_a_page_runs_with_its_slow_blocks(place: Path, page: str) -> None:
    if page == "serving":
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    run_page(f"{page}.md", slow=True)


@pytest.mark.check
def test_sharing(place: Path, hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.cli.push.quiet_libraries", lambda **_: None)
    run_page("sharing.md")
    assert len(hub.pushed("me/smol-gla")) == 1
    small = {path.name: (path / "model.safetensors").stat().st_size for path in place.glob("smol-*")}
    assert small["smol-int4"] < small["smol-int8"] < small["smol-gla"]


@pytest.mark.check
def test_a_recurrence_is_added_as_the_page_says(place: Path) -> None:
    before = dict(RECURRENCES)
    page = run_page("adding-a-recurrence.md")
    assert page["losses"][-1] < page["losses"][0]
    for name in RECURRENCES.keys() - before:
        del RECURRENCES[name]
    # Where nobody has registered it, a checkpoint says so.
    with pytest.raises(ValueError, match="layer 0: unknown recurrence 'longhorn'; there are: gla, "):
        LinearizedForCausalLM.from_pretrained("longhorn")


@pytest.mark.check
def test_the_commands_are_functions(place: Path) -> None:
    page = run_page("python.md")
    assert list(page["results"].scores) == ["teacher", "window_bytes", "no_recurrence", "model"]
    assert 0 < page["told"].new_tokens <= 20 and page["more"].new_tokens == 5
    assert (place / "smol-gla" / "README.md").stat().st_size == page["shared"].files["README.md"]
    assert "### What was kept, and what was lost" in (place / "smol-gla" / "README.md").read_text()
    assert "no such folder or file" in str(page["error_seen"])


@pytest.mark.parametrize("page", ["adding-a-recurrence.md", "new-family.md"])
def test_files_that_the_page_names_are_there(page: str) -> None:
    named = set(re.findall(r"`((?:linearize|kernels|tests|recipes)/[\w./]+)`", (DOCS / page).read_text()))
    assert len(named) > 2
    assert all((ROOT / name).exists() for name in named if "NAME" not in name)
