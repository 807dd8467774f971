"""lm-eval's tasks by name: equal to lm-eval's own evaluation, with tasks of a folder of YAML files."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.cli.app import run as command
from linearize.conversion.swap import convert_model
from linearize.errors import DataError, ModelError
from linearize.evaluation.runner import run
from linearize.evaluation.store import Store
from linearize.evaluation.tasks import index
from linearize.evaluation.tasks.suites import BENCHMARKS, SuiteOptions, build_suites, choose_tasks, list_tasks
from linearize.evaluation.tasks.task import TaskScore
from linearize.evaluation.tasks.tasks import task_definitions
from linearize.recipe import MixerSpec

from . import data_folder, tiny_model_folder
from .test_tasks import STOCK

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML tasks, which name their data by an absolute path."""
    folder = tmp_path_factory.mktemp("yaml")
    for path in (Path(__file__).parent / "lm_eval_tasks").iterdir():
        (folder / path.name).write_text(path.read_text().replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder(), dtype=torch.float32).eval()


@pytest.fixture
def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(tiny_model_folder())
    made.chat_template = TEMPLATE
    return made


def scores(
    model: Any, tokenizer: Any, names: list[str], include: Path, store: Store | None = None, limit: float | None = None,
    **options: Any,
) -> dict[tuple[str, str], TaskScore]:  # fmt: skip
    tasks = build_suites(choose_tasks(names, include=include), tokenizer, SuiteOptions(include=include, **options))
    found = run({"it": lambda: model}, tasks, tokenizer, store=store, limit=limit)["it"]
    return {(one.task, one.metric): one for one in found}


def theirs(model: Any, tokenizer: Any, names: list[str], include: Path, **options: Any) -> dict[str, Any]:
    """lm-eval's own evaluation by its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32"),
        tasks=names,
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return found


CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"num_fewshot": 1, "chat": True, "system": "Be brief."}, {
        "num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "lm_eval"), CALLS)
def test_every_item_is_that_of_lm_eval(
    model: Any, tokenizer: Any, include: Path, ours: dict[str, Any], lm_eval: dict[str, Any]
) -> None:
    assert_equal_to_lm_eval(model, tokenizer, include, ours, lm_eval)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "lm_eval"), CALLS)
def test_every_item_of_a_real_model_is_that_of_lm_eval(
    smollm2_path: Path, include: Path, ours: dict[str, Any], lm_eval: dict[str, Any]
) -> None:
    real = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    assert_equal_to_lm_eval(real, AutoTokenizer.from_pretrained(smollm2_path), include, ours, lm_eval)


def assert_equal_to_lm_eval(
    model: Any, tokenizer: Any, include: Path, ours: dict[str, Any], lm_eval: dict[str, Any]
) -> None:
    names = ["animals_choice", "animals_write"]
    found = scores(model, tokenizer, names, include, **ours)
    expected = theirs(model, tokenizer, names, include, **lm_eval)
    assert [key for key in found if key[0] == "animals_write"] == [
        ("animals_write", "exact_match,whole"), ("animals_write", "exact_match,first-word")
    ]  # fmt: skip
    for (task, metric), score in found.items():
        name, _, kept = metric.partition(",")
        assert score.value == pytest.approx(expected["results"][task][f"{name},{kept or 'none'}"], abs=1e-12)
        assert (score.suite, score.n, score.total) == (BENCHMARKS, 12, 12)
        if name != "mcc":
            samples = [one for one in expected["samples"][task] if one["filter"] == (kept or "none")]
            assert score.items == [float(one[name]) for one in sorted(samples, key=lambda one: one["doc_id"])]
    unpaired = found["animals_choice", "mcc"]
    assert (unpaired.items, unpaired.stderr, unpaired.n) == ([], None, 12)


LIMIT = 20


@pytest.fixture(scope="module")
def benchmarks(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML tasks with lm-eval's piqa and arc_easy, whose first `LIMIT` items are in local files."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = tmp_path_factory.mktemp("benchmarks")
    for path in include.iterdir():
        if path.is_file():
            (folder / path.name).write_text(path.read_text())
    for name in ("piqa", "arc_easy"):
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / STOCK[name])
        local = data_folder() / task_definitions()[name].local.path
        lines = local.read_text(encoding="utf-8").splitlines(keepends=True)[:LIMIT]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        split = "test" if config.get("test_split") else "validation"
        config = {key: value for key, value in config.items() if not key.endswith("_split") and key != "tag"}
        files = {"data_files": {split: str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, f"{split}_split": split}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.check
def test_the_command_equals_lm_evals(benchmarks: Path, tmp_path: Path) -> None:
    for folder in (tiny_model_folder(), converted_folder(tiny_model_folder(), tmp_path)):
        assert_the_command_equals_lm_evals(folder, benchmarks, tmp_path / f"report-{folder.name}")


@pytest.mark.slow
def test_the_command_on_a_real_model_equals_lm_evals(smollm2_path: Path, benchmarks: Path, tmp_path: Path) -> None:
    for folder in (smollm2_path, converted_folder(smollm2_path, tmp_path)):
        assert_the_command_equals_lm_evals(folder, benchmarks, tmp_path / f"report-{folder.name}")


def converted_folder(teacher: Path, folder: Path) -> Path:
    chosen = ["--set", "mixer.window=16", "--set", "dtype=float32"]
    assert command(["convert", str(teacher), "-o", str(folder / "converted"), "-r", "window-gla", *chosen]) == 0
    return folder / "converted"


def assert_the_command_equals_lm_evals(folder: Path, include: Path, report: Path) -> None:
    """`linearize eval` against `lm_eval --model hf` and `--model linearize` on one checkpoint, item by item."""
    from lm_eval.__main__ import cli_evaluate

    names = "piqa,arc_easy,gsm8k,ifeval"
    line = ["eval", str(folder), "--tasks", names, "--include-path", str(include), "--limit", str(LIMIT)]
    more = ["--baseline", "none", "--dtype", "float32", "--batch-size", "4", "--fresh", "--report", str(report)]
    assert command([*line, *more]) == 0
    measured = json.loads((report / "results.json").read_text())["tasks"]
    found = {(one["task"], one["metric"]): next(iter(one["systems"].values())) for one in measured}
    assert {task for task, _ in found} == set(names.split(","))
    for kind in ("hf", "linearize"):
        out = report / kind
        arguments = f"pretrained={folder},dtype=float32,softmax_dtype=float32,trust_remote_code=True"
        settings = ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(out)]
        line = [
            "--model", kind, "--model_args", arguments, "--tasks", names, "--include_path", str(include),
            "--limit", str(LIMIT), *settings,
        ]  # fmt: skip
        if kind == "linearize":
            subprocess.run([sys.executable, "-m", "linearize.evaluation.tasks.lm", *line], check=True)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["lm_eval", *line])
                cli_evaluate()
        for (task, metric), score in found.items():
            name, _, kept = metric.partition(",")
            (file,) = out.rglob(f"samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            theirs = {one["doc_id"]: one[name] for one in samples if one["filter"] == (kept or "none")}
            (results,) = out.rglob("results_*.json")
            value = json.loads(results.read_text())["results"][task][f"{name},{kept or 'none'}"]
            assert score["value"] == pytest.approx(value, abs=1e-12), (kind, task, metric)
            if score["items"]:
                assert score["items"] == [float(theirs[index]) for index in sorted(theirs)], (kind, task, metric)


def test_answers_of_texts_are_those_of_lm_eval(model: Any, tokenizer: Any, include: Path) -> None:
    options = SuiteOptions(include=include)
    (task,) = build_suites(choose_tasks(["animals_write"], include=include), tokenizer, options)
    answers = task.answers(model, tokenizer, [7, 3], 2)  # type: ignore[attr-defined]
    samples = theirs(model, tokenizer, ["animals_write"], include)["samples"]["animals_write"]
    for index_, answer in zip([7, 3], answers, strict=True):
        sample = next(one for one in samples if one["doc_id"] == index_ and one["filter"] == "whole")
        # The very prompt, with the very solved examples, and the very text.
        assert answer.arguments == sample["arguments"]
        assert answer.responses == sample["filtered_resps"]


def test_checks_that_draw_at_random_give_an_item_one_result(model: Any, tokenizer: Any, include: Path) -> None:
    (task,) = build_suites(choose_tasks(["animals_write"], include=include), tokenizer, SuiteOptions(include=include))
    (leaf,) = task._leaves  # type: ignore[attr-defined]
    leaf.task.process_results = lambda document, responses: {"exact_match": random.random()}  # noqa: S311
    before = random.getstate()
    alone, (other, again) = task.score(model, tokenizer, [3], 2), task.score(model, tokenizer, [7, 3], 2)
    assert alone == [again] and other != again
    assert random.getstate() == before


@pytest.mark.parametrize("converted", [False, True])
def test_long_prompts_are_read_in_pieces_and_few_together(
    converted: bool, model: Any, tokenizer: Any, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize.evaluation.tasks import lm

    reader = convert_model(copy.deepcopy(model), MixerSpec(window=16)).eval() if converted else model
    (task,) = build_suites(choose_tasks(["animals_write"], include=include), tokenizer, SuiteOptions(include=include))
    expected = task.answers(reader, tokenizer, range(6), 6)  # type: ignore[attr-defined]
    generate, sizes = reader.generate, list[tuple[int, int | None]]()

    def watched(**options: Any) -> Any:
        sizes.append((len(options["input_ids"]), options.get("prefill_chunk_size")))
        return generate(**options)

    monkeypatch.setattr(reader, "generate", watched)
    monkeypatch.setattr(lm, "PROMPTS", 2 * max(len(tokenizer(one.arguments[0][0]).input_ids) for one in expected))
    monkeypatch.setattr(lm, "prefill_chunk", lambda device, rows: 7)
    found = task.answers(reader, tokenizer, range(6), 6)  # type: ignore[attr-defined]
    assert sizes == [(2, 7)] * 3
    assert [one.responses for one in found] == [one.responses for one in expected]


def test_groups_tags_and_perplexities(model: Any, tokenizer: Any, include: Path) -> None:
    found = scores(model, tokenizer, ["animals", "animals_text"], include)
    expected = theirs(model, tokenizer, ["animals", "animals_text"], include)["results"]
    group = found["animals", "acc"]
    assert set(found) == {("animals", "acc"), ("animals_text", "word_perplexity"), ("animals_text", "bits_per_byte")}
    assert group.value == pytest.approx(expected["animals"]["acc,none"])
    assert {tag["task"] for tag in group.tags} == {"animals_choice", "animals_read"} and group.n == 24
    for metric in ("word_perplexity", "bits_per_byte"):
        score = found["animals_text", metric]
        assert score.value == pytest.approx(expected["animals_text"][f"{metric},none"], rel=1e-5)
        assert score.stderr is not None and len(score.items) == 12
    chosen = choose_tasks(["animals_all"], include=include)
    tasks = build_suites(chosen, tokenizer, SuiteOptions(include=include))
    assert {one.name for one in tasks} == {"animals_choice", "animals_read", "animals_write"}


def test_nothing_is_scored_twice(model: Any, tokenizer: Any, include: Path, tmp_path: Path) -> None:
    store, few = Store(tmp_path), scores(model, tokenizer, ["animals_write"], include, limit=0.25)
    assert {one.n for one in few.values()} == {3}
    first = scores(model, tokenizer, ["animals_write"], include, store, limit=0.25)
    assert first == few
    whole = scores(model, tokenizer, ["animals_write"], include, store)
    lines = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines() if line]
    items = [line["item"] for line in lines if "item" in line]
    assert sorted(items) == list(range(12))  # three of them from the first call
    assert scores(model, tokenizer, ["animals_write"], include, store) == whole
    assert scores(model, tokenizer, ["animals_write"], include) == whole


def test_what_is_refused(model: Any, tokenizer: Any, include: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task called 'animal_choice': did you mean animals_choice"):
        choose_tasks(["animal_choice"], include=include)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        choose_tasks(["piqa"], include=tmp_path / "nowhere")
    with pytest.raises(DataError, match="names a task, group or tag"):
        choose_tasks(["piqa"], include=tmp_path)
    bare = AutoTokenizer.from_pretrained(tiny_model_folder())
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        scores(model, bare, ["animals_choice"], include, chat=True)
    (tmp_path / "long.yaml").write_text(
        (include / "animals_write.yaml").read_text().replace("animals_write", "long").replace("toks: 6", "toks: 99999")
    )
    with pytest.raises(ModelError, match=r"task long: .*max tokens to generate"):
        scores(model, tokenizer, ["long"], tmp_path)
    (tmp_path / "long.yaml").write_text((include / "animals_write.yaml").read_text().replace("questions", "none"))
    with pytest.raises(DataError, match=r"task animals_write: cannot be loaded \(FileNotFoundError") as caught:
        scores(model, tokenizer, ["animals_write"], tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "long.yaml").write_text((include / "ifeval.yaml").read_text())
    (tmp_path / "orders.py").write_text("import no_such_package")
    with pytest.raises(
        DataError, match="task ifeval: needs the Python package no_such_package, which is not installed"
    ):
        scores(model, tokenizer, ["ifeval"], tmp_path)
    with pytest.raises(DataError, match="solved examples were asked for"):
        build_suites({"core": ["piqa"]}, tokenizer, SuiteOptions(data=data_folder(), num_fewshot=2))


def test_from_the_command_line(include: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["eval", str(tiny_model_folder()), "--tasks", "animals_choice,animals_write", "--include-path", str(include)]
    assert command([*line, "--limit", "0.5", "--report", str(tmp_path / "report"), "--json"]) == 0
    out, words = capfd.readouterr()
    found = json.loads(out)
    assert found["limit"] == 0.5 and found["items"]["animals_write"] == {"n": 6, "of": 12}
    assert words.rstrip().endswith(f"report: {tmp_path / 'report' / 'report.html'}")
    assert "50 % of each task" in (tmp_path / "report" / "report.md").read_text()
    assert command(["eval", "--list", "animals_w*", "--include-path", str(include), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == [{"name": "animals_write", "kind": "task", "about": ""}]
    assert command(["eval", "--list", "zebras_*", "--include-path", str(include)]) == 1
    assert "no suite or task has such a name" in capfd.readouterr().err
    assert command(["eval"]) == 2
    assert "name a MODEL, or pass --list" in capfd.readouterr().err


def test_names_of_lm_eval_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = index.lm_eval_names()
    monkeypatch.undo()
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    monkeypatch.setattr(index, "_scan", lambda **_: few)
    first = index.lm_eval_names()
    assert first == few and first["mmlu_anatomy"].kind == "task" and first["ai2_arc"].members
    monkeypatch.setattr(index, "_scan", lambda **_: pytest.fail("read again"))
    assert index.lm_eval_names() == first
    kinds = {name: kind for name, kind, _ in list_tasks("a")}
    assert (kinds["passkey"], kinds["recall"], kinds["mmlu_anatomy"]) == ("task", "suite", "task")
    assert choose_tasks(["mmlu_*", "piqa"]) == {BENCHMARKS: ["mmlu_anatomy"], "core": ["piqa"]}


@pytest.mark.slow
def test_every_name_of_lm_eval_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    names = index.lm_eval_names()
    assert {"gsm8k", "mmlu_pro", "ifeval", "ruler", "lambada_openai", "mmlu_anatomy", "ai2_arc"} <= set(names)
    assert len(names) > 5000


@pytest.mark.parametrize("plain", [False, True])
def test_an_answer_beyond_the_context_is_told(plain: bool) -> None:
    from lm_eval.api.instance import Instance

    from linearize.evaluation.tasks.lm import LinearizeLM

    model = LinearizeLM(str(tiny_model_folder()), dtype="float32", max_length=16, plain=plain, device="cpu")
    asked = [Instance("loglikelihood", {}, ("Once", " upon a time" * 10), 0)]
    with pytest.raises(AssertionError, match=r"an answer has [\d,]+ tokens, and the model's context 16; leave"):
        model.loglikelihood(asked, disable_tqdm=True)


def test_lm_eval_knows_our_model_by_name(include: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from linearize.evaluation.tasks import lm

    assert lm.LinearizeLM.__name__ == "LinearizeLM"
    found = [
        simple_evaluate(
            model=name,
            model_args={"pretrained": str(tiny_model_folder()), "dtype": "float32", "softmax_dtype": "float32"},
            tasks=["animals_choice"],
            device="cpu",
            batch_size=4,
            task_manager=TaskManager(include_path=str(include), include_defaults=False),
            bootstrap_iters=0,
        )["samples"]["animals_choice"]
        for name in ("linearize", "hf")
    ]
    for ours, theirs_ in zip(*found, strict=True):
        assert (ours["acc"], ours["acc_norm"]) == (theirs_["acc"], theirs_["acc_norm"])
        for (nats,), (expected,) in zip(ours["resps"], theirs_["resps"], strict=True):
            assert nats[0] == pytest.approx(expected[0], rel=2e-5) and nats[1] == expected[1]
