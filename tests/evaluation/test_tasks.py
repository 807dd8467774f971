"""The task files against lm-eval's own, and the errors a user can cause."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from linearize.errors import DataError
from linearize.evaluation.tasks.tasks import available_tasks, build_tasks, task_definitions

from . import data_folder

STOCK = {name: one.file for name, one in task_definitions().items() if name != "mmlu"}
PUBLIC_ITEMS = {
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "winogrande": 1267,
    "lambada": 5153,
    "wikitext2": 62,
}


def items_of(name: str, folder: Path) -> int:
    """How many items the task's file has: its lines, or its titles of pages."""
    local = task_definitions()[name].local
    assert local is not None
    text = (folder / local.path).read_text(encoding="utf-8")
    return len(re.findall(r"^ = [^=\n]+ = $" if name == "wikitext2" else r"^\{", text, flags=re.MULTILINE))


def test_every_task_has_a_line_of_description() -> None:
    assert set(available_tasks("core")) == set(STOCK)
    assert set(available_tasks()) == {*STOCK, "mmlu"}
    assert all(about and "\n" not in about for about in available_tasks().values())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("from linearize.evaluation.tasks import tasks; tasks.available_tasks()", ("lm_eval", "datasets", "torch")),
        ("from linearize.evaluation import heldout", ("lm_eval", "datasets", "transformers")),
        ("from linearize.evaluation.results import report", ("lm_eval", "datasets", "torch")),
    ],
)
def test_light_modules_stay_light(statement: str, heavy: tuple[str, ...]) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; assert not set({heavy}) & set(sys.modules)"], check=True
    )


def test_definitions_are_those_of_lm_eval() -> None:
    known = task_definitions()
    piqa, wikitext = known["piqa"], known["wikitext2"]
    assert known["hellaswag"].config["process_docs"].__module__ == "lm_eval.tasks.hellaswag.utils"
    assert (piqa.config["task"], piqa.config["doc_to_choice"]) == ("piqa", "{{[sol1, sol2]}}")
    assert (wikitext.config["task"], wikitext.splits) == ("wikitext2", ["test"])
    assert (piqa.splits, known["mmlu"].splits) == (["validation"], ["test", "dev"])
    with pytest.raises(DataError, match=r"task piqa: the installed lm-eval has no piqa/moved\.yaml"):
        _ = replace(piqa, file="piqa/moved.yaml").config


def test_all_local_files_are_read_whole() -> None:
    built = build_tasks(list(STOCK), data_folder())
    found = {name: len(groups[""].eval_docs) for name, groups in built.items()}
    assert found == {name: items_of(name, data_folder()) for name in STOCK} and min(found.values()) > 10


@pytest.mark.public
def test_the_public_sets_have_all_their_items(public_folder: Path) -> None:
    built = build_tasks([*STOCK, "mmlu"], public_folder)
    mmlu = built.pop("mmlu")
    assert {name: len(groups[""].eval_docs) for name, groups in built.items()} == PUBLIC_ITEMS
    assert sum(len(task.eval_docs) for task in mmlu.values()) == 14042


def test_wikitext_pages_lose_no_text() -> None:
    task = build_tasks(["wikitext2"], data_folder())["wikitext2"][""]
    pages = task.eval_docs["page"]
    whole = (data_folder() / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    # Only the blank line before the first title is dropped.
    assert "\n".join(pages).strip() == whole.strip()
    assert all(re.match(r" = [^=].* = \n", page) for page in pages)


def test_repeated_names_count_once() -> None:
    assert list(build_tasks(["piqa", "piqa"], data_folder())) == ["piqa"]


@pytest.mark.parametrize(
    ("name", "hint"), [("arc_esy", "arc_easy"), ("lambada_openai", "lambada"), ("zzz", "choose from arc_challenge")]
)
def test_unknown_task_names_the_nearest(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=hint) as caught:
        build_tasks(["piqa", name], tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tasks() -> None:
    with pytest.raises(DataError, match="no tasks given"):
        build_tasks([], None)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data folder .*nowhere.*piqa\.validation\.jsonl"):
        build_tasks(["piqa"], tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"piqa needs piqa/piqa\.validation\.jsonl, which is not in .*--data"):
        build_tasks(["piqa"], tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"goal": "boil an egg", "sol1":', "line 3: not JSON"),
        ("[1, 2]", "line 3: not a JSON object"),
        ('{"goal": "boil an egg", "sol1": "a", "sol2": "b"}', "line 3: no field 'label'"),
    ],
)
def test_broken_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    good = '{"goal": "boil an egg", "sol1": "in water", "sol2": "in sand", "label": 0}'
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "piqa.validation.jsonl").write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        build_tasks(["piqa"], tmp_path)
    assert "piqa.validation.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\xfe\x00", "cannot read")])
def test_empty_or_undecodable_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "piqa.validation.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_tasks(["piqa"], tmp_path)


def test_unreachable_hub_suggests_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match=r"cannot load baber/piqa from the Hub .*--data DIR") as caught:
        build_tasks(["piqa"], None)
    assert "\n" not in str(caught.value)


def test_hub_documents_go_through_process_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def from_hub(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        record = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a [x] b", "c"]}
        return datasets.Dataset.from_list([{**record, "label": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    task = build_tasks(["hellaswag"], None)["hellaswag"][""]
    document = task.eval_docs[0]
    assert asked == [("Rowan/hellaswag", None, "validation")]
    assert task.doc_to_text(document) == "Roof: A man sits. He"
    assert task.doc_to_choice(document) == ["a b", "c"]
    assert task.doc_to_target(document) == 1


def test_local_data_touches_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(datasets, "load_dataset", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    shutil.copytree(data_folder() / "arc", tmp_path / "arc")
    documents = build_tasks(["arc_easy"], tmp_path)["arc_easy"][""].eval_docs
    assert len(documents) == items_of("arc_easy", data_folder())


def test_mmlu_is_that_of_lm_eval() -> None:
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    files = sorted(path for path in folder.glob("mmlu_*.yaml"))
    built = build_tasks(["mmlu"], data_folder())["mmlu"]
    assert len(files) == len(built) == 57
    assert sum(len(task.eval_docs) for task in built.values()) == items_of("mmlu", data_folder())
    for number, path in enumerate(files):
        stock = load_yaml(path)
        subject = stock["dataset_name"]
        task = built[subject]
        if number % 10:
            continue
        splits = {"test": task.eval_docs, "dev": datasets.Dataset.from_list(list(task.fewshot_docs()))}
        config = {key: value for key, value in stock.items() if key not in ("tag", "task_alias")}
        theirs = ConfigurableTask(config={**config, "custom_dataset": lambda splits=splits, **_: splits})
        for document in task.eval_docs.select(range(3)):
            # Papers, and lm-eval's group of the 57, give five examples.
            prompt = theirs.fewshot_context(document, num_fewshot=5)
            assert task.fewshot_context(document, num_fewshot=task.config.num_fewshot) == prompt
            asked, expected = (one.construct_requests(document, prompt) for one in (task, theirs))
            assert [request.args for request in asked] == [request.args for request in expected]
            assert task.doc_to_target(document) == theirs.doc_to_target(document)


def test_mmlu_without_a_subject_in_one_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()
    line = '{"subject": "SUBJECT", "question": "?", "choices": ["a", "b", "c", "d"], "answer": 1}\n'
    (tmp_path / "mmlu" / "mmlu.test.jsonl").write_text(line.replace("SUBJECT", "anatomy"))
    (tmp_path / "mmlu" / "mmlu.dev.jsonl").write_text(line.replace("SUBJECT", "virology"))
    with pytest.raises(DataError, match="subject anatomy has no documents in the dev split"):
        build_tasks(["mmlu"], tmp_path)
    (tmp_path / "mmlu" / "mmlu.dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"mmlu needs mmlu/mmlu\.dev\.jsonl"):
        build_tasks(["mmlu"], tmp_path)
